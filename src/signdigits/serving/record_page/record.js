// Records frames of the camera into the class that is named, while a button is held, and shows what the folder holds.

import { Trouble, canSee, capture, getCamera, pause, showStream, stop } from "./camera.js";

const SIDE = 512; // pixels of a frame; training takes a fifth of it
const FRAMES = 20; // while the button is held once
const INTERVAL = 200; // milliseconds from one frame to the next, at least
const PATIENCE = 30_000; // milliseconds that an answer may take

const CAMERA_WORDS = {
  InsecureContext: "Browsers open the camera only for an address on this machine: take the one that scripts/record has printed.",
  NotAllowedError: "The camera was refused. Allow it for this page in the browser's settings.",
  NotFoundError: "No camera was found. Connect one, then open it again.",
  NotReadableError: "The camera is used by another program. Close that one, then open it again.",
};

const page = (id) => document.getElementById(id);

let stream = null; // the camera's
let isHeld = false; // the button
let isRecording = false;

/* What the visitor does */

page("naming").addEventListener("submit", (event) => {
  event.preventDefault();
  (stream ? page("hold") : page("open")).focus();
});
page("label").addEventListener("change", () => attempt(showClass));

page("open").addEventListener("click", () => attempt(openCamera));
page("close").addEventListener("click", () => {
  closeCamera();
  page("open").focus();
});

const hold = page("hold");
hold.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  hold.setPointerCapture(event.pointerId); // its end is seen wherever it is
  press();
});
for (const name of ["pointerup", "pointercancel", "blur"]) hold.addEventListener(name, release);
hold.addEventListener("contextmenu", (event) => event.preventDefault()); // of a finger that rests
for (const name of ["keydown", "keyup"]) {
  hold.addEventListener(name, (event) => {
    if (event.key !== " " && event.key !== "Enter") return;
    event.preventDefault(); // no click follows
    if (name === "keyup") release();
    else if (!event.repeat) press();
  });
}
hold.addEventListener("click", (event) => {
  if (event.detail === 0) press(); // of assistive technology, which cannot hold: all frames
});
document.addEventListener("visibilitychange", release);

/** Do something, and show what goes wrong. */
async function attempt(work) {
  page("trouble").hidden = true;
  try {
    await work();
  } catch (trouble) {
    page("trouble").textContent = trouble.message;
    page("trouble").hidden = false;
  }
}

/* The camera */

async function openCamera() {
  if (stream) return;
  stream = await getCamera(CAMERA_WORDS);
  stream.getVideoTracks()[0].addEventListener("ended", () => {
    closeCamera();
    attempt(() => { throw new Trouble("The camera has gone. Connect it, then open it again."); });
  });
  showStream(page("video"), stream);
  showCamera(true);
  (page("label").value.trim() ? hold : page("label")).focus();
}

function closeCamera() {
  release();
  stop(stream);
  stream = null;
  page("video").srcObject = null;
  showCamera(false);
}

function showCamera(isOpen) {
  for (const id of ["video", "hold", "close"]) page(id).hidden = !isOpen;
  for (const id of ["empty", "open"]) page(id).hidden = isOpen;
  page("frame").classList.toggle("filled", isOpen);
}

/* Recording */

function press() {
  isHeld = true;
  if (!isRecording) attempt(record);
}

function release() {
  isHeld = false;
}

/** Record frames until the button is released, or there are enough. */
async function record() {
  const label = page("label").value.trim();
  if (!label) {
    setTimeout(() => page("label").focus()); // after the press, which moves it to the button
    throw new Trouble("Name the class first.");
  }
  isRecording = true;
  page("summary").textContent = "";
  let kept = 0;
  try {
    while (isHeld && stream && kept < FRAMES) {
      const next = performance.now() + INTERVAL;
      if (canSee(page("video"))) {
        const frame = await capture(page("video"), SIDE);
        show(await ask("POST", "photographs", { class: label }, frame));
        kept += 1;
        page("progress").value = kept / FRAMES;
      }
      await pause(next - performance.now());
    }
  } finally {
    isRecording = false;
    page("progress").value = 0;
    page("summary").textContent = `${kept === 1 ? "1 frame" : `${kept} frames`} of ${label} recorded.`;
  }
}

async function showClass() {
  show(await ask("GET", "folder.json", { class: page("label").value }));
}

/** Delete a frame; the focus goes to the next one. */
async function remove(label, name) {
  const items = [...page("frames").children];
  const position = items.findIndex((item) => item.dataset.name === name);
  show(await ask("DELETE", "photographs", { class: label, name }));
  page("summary").textContent = "1 frame deleted.";
  const next = page("frames").children[position] ?? page("frames").lastElementChild;
  (next?.firstElementChild ?? page("label")).focus();
}

/** The recorder's answer: { folder, command, counts, class, recorded }. Throws Trouble. */
async function ask(method, target, query, body) {
  let reply, text;
  try {
    const signal = AbortSignal.timeout(PATIENCE);
    reply = await fetch(`${target}?${new URLSearchParams(query)}`, { method, body, signal });
    text = await reply.text();
  } catch {
    throw new Trouble("The recorder does not answer. Start scripts/record again.");
  }
  if (!reply.ok) throw new Trouble(text);
  return JSON.parse(text);
}

/* What the page shows */

function show({ folder, command, counts, class: label, recorded }) {
  const names = Object.keys(counts);
  page("folder").textContent = folder;
  page("command").textContent = command;
  page("names").replaceChildren(...names.map((name) => new Option(name)));
  page("counts").replaceChildren(...names.map((name) => line(name, counts[name])));
  page("table").hidden = names.length === 0;
  page("none").hidden = names.length > 0;
  const shown = new Map([...page("frames").children].map((item) => [item.dataset.name, item]));
  page("frames").replaceChildren(...recorded.map((name) => shown.get(name) ?? item(label, name)));
  page("recorded-title").textContent = `The last frames of ${label}`;
  page("recorded").hidden = recorded.length === 0;
}

/** A line of the table: the class, which a click chooses, and the number of its photographs. */
function line(name, count) {
  const [row, head, button] = ["tr", "th", "button"].map((tag) => document.createElement(tag));
  head.scope = "row";
  button.type = "button";
  button.textContent = name;
  button.addEventListener("click", () => {
    page("label").value = name;
    attempt(showClass);
    (stream ? hold : page("open")).focus(); // this line is made anew
  });
  head.append(button);
  row.append(head);
  row.insertCell().textContent = count;
  return row;
}

/** A recorded frame, which a click deletes. */
function item(label, name) {
  const [entry, button, image] = ["li", "button", "img"].map((tag) => document.createElement(tag));
  entry.dataset.name = name;
  button.type = "button";
  button.setAttribute("aria-label", `Delete frame ${name.split("-")[2]}`);
  button.addEventListener("click", () => attempt(() => remove(label, name)));
  image.src = `photographs?${new URLSearchParams({ class: label, name })}`;
  image.alt = "";
  button.append(image);
  entry.append(button);
  return entry;
}

attempt(showClass);
