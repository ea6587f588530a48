// Takes photographs from files, drops or the camera, asks /invocations about them, and shows the answers or the trouble.

import { Trouble, canSee, capture, draw, getCamera, pause, showStream, stop } from "./camera.js";

const LONGEST_SIDE = 1024; // pixels; the network sees a tenth of it, and a telephone's photograph has 4000
const LIVE_SIDE = 256; // pixels of what is sent while the camera is open
const LIVE_INTERVAL = 250; // milliseconds from one question about the camera's picture to the next, at least
const LOGGED = 10_000; // milliseconds between two live frames that the server logs
const STEADY = 1000; // milliseconds of answers that a live reading is the mean of
const LIVE_PAUSE = 2000; // milliseconds after a refusal
const PATIENCE = 30_000; // milliseconds that an answer may take
const TOKEN = "token"; // its name in the tab's storage
const EMPTY = "Drop a photograph here";

const NO_MODEL = "No model answers at the moment; it may just be starting. Wait a moment, then send it again.";
const WORDS = {
  401: "This server answers only those who know its token.",
  413: "The photograph is too large for this server. Choose a smaller one.",
  429: "Too many photographs in a short time. Wait a moment, then send it again.",
  502: NO_MODEL,
  503: NO_MODEL,
  507: "This server has no room for more corrections.",
  504: "The model did not answer in time. Wait a moment, then send it again.",
};

const CAMERA_WORDS = {
  InsecureContext: "Browsers open the camera only for an address that begins with https. Choose a photograph.",
  NotAllowedError: "The camera was refused. Allow it for this page in the browser's settings, or choose a photograph.",
  NotFoundError: "No camera was found. Choose a photograph instead.",
  NotReadableError: "The camera is used by another program. Close that one, or choose a photograph.",
};

const settings = fetch("settings.json").then((reply) => reply.json()); // max_bytes, media_types, takes_corrections, reads_digits

const page = (id) => document.getElementById(id);

// The page's own words suit any classes; these take their place for a model that reads digits.
const DIGITS = {
  title: "Sign digits",
  purpose: "Show a hand that signs a digit from 0 to 9, and the model reads it.",
  subject: "one hand before a plain background, filling most of a square;",
  pose: "the palm of either hand towards the camera, the fingers upwards;",
  caption: "Probability of each digit",
  class: "Digit",
};
settings.then(({ reads_digits }) => {
  if (!reads_digits) return;
  for (const [id, words] of Object.entries(DIGITS)) page(id).textContent = words;
  document.title = DIGITS.title;
});

let photograph = null; // the Blob that was sent last, for another attempt or an explanation
let work = new AbortController(); // what is under way: whatever the visitor does next ends it
let stream = null; // the camera's

/* What the visitor does */

page("choose").addEventListener("click", () => page("file").click());
page("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = ""; // so that the same file can be chosen again
  if (file) take(file);
});

// Anywhere on the page: a browser would leave it for a file that misses the frame.
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    const gone = name === "drop" || (name === "dragleave" && event.relatedTarget === null);
    page("frame").classList.toggle("over", !gone);
  });
}

document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (file) take(file);
  else showTrouble(new Trouble("That was no file. Save the photograph first, then drop the file."));
});

page("open-camera").addEventListener("click", openCamera);
page("take").addEventListener("click", takePicture);
page("close-camera").addEventListener("click", () => {
  closeCamera();
  begin("No photograph yet."); // the live reading ends
  page("advice").hidden = false;
  page("open-camera").focus();
});

page("again").addEventListener("click", () => ask(photograph, begin("Reading …")));

page("explain").addEventListener("click", toggleExplanation);
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input") || event.ctrlKey || event.altKey || event.metaKey;
  if (event.key === "e" && !typing && !page("explaining").hidden) toggleExplanation();
});

page("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, page("token").value.trim());
  page("token").value = "";
  ask(photograph, begin("Reading …"));
  page("choose").focus(); // the form has gone
});

page("correction").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { signal } = work;
  try {
    await sendCorrection(photograph, page("label").value, signal);
    if (signal.aborted) return;
    page("correction").hidden = true;
    page("thanks").hidden = false;
  } catch (trouble) {
    if (!signal.aborted) showTrouble(trouble);
  }
});

/** End what is under way and begin something else; what awaits must stop when this signal is aborted. */
function begin(words) {
  work.abort();
  work = new AbortController();
  clearReading(words);
  return work.signal;
}

/* Files */

/** Show a file's photograph, and ask about it. */
async function take(file) {
  closeCamera();
  const signal = begin("Reading …");
  try {
    const prepared = await prepare(file);
    if (signal.aborted) return;
    photograph = prepared.blob;
    if (prepared.shown) showPhotograph(photograph);
    else showEmpty("This file cannot be shown");
    await ask(photograph, signal);
  } catch (trouble) {
    if (!signal.aborted) showTrouble(trouble);
  }
}

/**
 * What is sent for a file: a smaller JPEG if it is large, or of a kind that only the browser can read. A file that the
 * browser cannot read either goes as it is: the server says what is wrong with it.
 */
async function prepare(file) {
  const { max_bytes, media_types } = await settings;
  let picture;
  try {
    picture = await createImageBitmap(file); // upright: the browser follows the EXIF orientation
  } catch {
    if (file.size > max_bytes) {
      throw new Trouble(`This file is no photograph, or is larger than ${Math.floor(max_bytes / 1e6)} megabytes.`);
    }
    return { blob: file, shown: false };
  }
  const { width, height } = picture;
  const small = Math.max(width, height) <= LONGEST_SIDE && file.size <= max_bytes;
  const kept = small && media_types.includes(file.type);
  const blob = kept ? file : await draw(picture, { left: 0, top: 0, width, height }, LONGEST_SIDE);
  picture.close();
  return { blob, shown: true };
}

/* The camera */

async function openCamera() {
  const signal = begin("Opening the camera …");
  try {
    const opened = await getCamera(CAMERA_WORDS);
    if (signal.aborted) return stop(opened);
    showCamera(opened, signal);
  } catch (trouble) {
    if (!signal.aborted) showTrouble(trouble);
  }
}

function showCamera(opened, signal) {
  stream = opened;
  const [track] = stream.getVideoTracks();
  track.addEventListener("ended", () => {
    closeCamera();
    begin("Not read.");
    showTrouble(new Trouble("The camera has gone. Connect it again, or choose a photograph."));
  });
  showStream(page("video"), stream);
  showInFrame("video");
  page("sources").hidden = true;
  page("shutter").hidden = false;
  page("summary").textContent = "The camera is open.";
  page("advice").hidden = false;
  page("take").focus();
  readLive(signal);
}

/** Read what the camera sees, one question at a time, until something else begins. */
async function readLive(signal) {
  let answers = [];
  let logged = -Infinity; // one frame in ten seconds is a prediction to be monitored: a visitor is not a hundred
  while (!signal.aborted) {
    if (!canSee(page("video")) || document.hidden) {
      await pause(LIVE_INTERVAL);
      continue;
    }
    const next = performance.now() + LIVE_INTERVAL;
    photograph = await capture(page("video"), LIVE_SIDE);
    try {
      const isLive = performance.now() - logged < LOGGED;
      const answer = await post(photograph, signal, { isLive });
      const now = performance.now();
      if (!isLive) logged = now;
      answers = [...answers.filter(({ time }) => now - time < STEADY), { ...answer, time: now }];
      if (!signal.aborted) showAnswer(meanAnswer(answers), { live: true });
    } catch (trouble) {
      if (signal.aborted) return;
      if (!trouble.again) {
        closeCamera();
        showPhotograph(photograph);
        return showTrouble(trouble);
      }
      showTrouble(trouble);
      await pause(LIVE_PAUSE);
    }
    await pause(next - performance.now());
  }
}

/** The mean of some answers: a reading that does not flicker. An outlier if most of them are. */
function meanAnswer(answers) {
  const { probabilities, version } = answers.at(-1);
  const alike = answers.filter((answer) => answer.version === version);
  const mean = (value) => alike.reduce((sum, answer) => sum + value(answer), 0) / alike.length;
  const means = Object.keys(probabilities).map((name) => [name, mean((answer) => answer.probabilities[name])]);
  const [label, probability] = means.reduce((best, other) => (other[1] > best[1] ? other : best));
  const is_outlier = mean((answer) => (answer.is_outlier ? 1 : 0)) > 0.5;
  return { label, probability, probabilities: Object.fromEntries(means), is_outlier, version };
}

/** Ask about the square that the frame shows, and keep it there. */
async function takePicture() {
  if (!canSee(page("video"))) return;
  const signal = begin("Reading …");
  photograph = await capture(page("video"), LONGEST_SIDE);
  closeCamera();
  showPhotograph(photograph);
  page("open-camera").focus(); // for the next one; the button that was pressed has gone
  await ask(photograph, signal);
}

function closeCamera() {
  if (!stream) return;
  stop(stream);
  stream = null;
  page("video").srcObject = null;
  page("sources").hidden = false;
  page("shutter").hidden = true;
  showEmpty(EMPTY);
}

/* The question */

/** Ask the server about a photograph and show what it says, unless something else has begun by then. */
async function ask(blob, signal) {
  try {
    const answer = await post(blob, signal);
    if (!signal.aborted) showAnswer(answer);
  } catch (trouble) {
    if (!signal.aborted) showTrouble(trouble);
  }
}

/** The server's answer: { label, probability, probabilities, is_outlier, explanation, version }. Throws Trouble. */
async function post(blob, signal, { params, isLive = false } = {}) {
  const value = { dataframe_records: [{ image: await base64(blob) }], params };
  const { reply, text } = await send("invocations", value, signal, isLive ? { "Live-Frame": "1" } : {});
  try {
    return { ...JSON.parse(text).predictions[0], version: reply.headers.get("Model-Version") };
  } catch {
    throw new Trouble("The server's answer cannot be understood.", { again: true });
  }
}

/** Send a photograph with the label that it should have been given. Throws Trouble. */
async function sendCorrection(blob, label, signal) {
  await send("corrections", { image: await base64(blob), label }, signal);
}

/** Post a value as JSON; the reply, and its text. Throws Trouble. */
async function send(target, value, signal, more = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { "Content-Type": "application/json", ...more };
  if (token) headers.Authorization = `Bearer ${token}`;
  const { reply, text } = await exchange(target, { method: "POST", headers, body: JSON.stringify(value) }, signal);
  if (!reply.ok) throw refusal(reply.status, text, token);
  return { reply, text };
}

async function exchange(target, options, signal) {
  const limit = new AbortController();
  setTimeout(() => limit.abort(), PATIENCE);
  try {
    const reply = await fetch(target, { ...options, signal: AbortSignal.any([signal, limit.signal]) });
    return { reply, text: await reply.text() };
  } catch {
    const words = limit.signal.aborted
      ? `No answer within ${PATIENCE / 1000} seconds. Wait a moment, then send it again.`
      : "The server does not answer. Perhaps it is not running, or the network is down.";
    throw new Trouble(words, { again: true });
  }
}

/** What a reply other than 200 means. */
function refusal(status, text, token) {
  if (status === 401) {
    sessionStorage.removeItem(TOKEN);
    return new Trouble(token ? "The server does not know this token." : WORDS[401], { asksForToken: true });
  }
  if (status === 400) return new Trouble(`The photograph cannot be read: ${reason(text)}.`);
  const words = WORDS[status] ?? `The server refused the photograph (${status}): ${reason(text)}.`;
  return new Trouble(words, { again: status === 429 || status >= 500 });
}

/** What the server says, without the row, which is the only one, and without what MLflow puts before it. */
function reason(text) {
  try {
    return JSON.parse(text).message.split("Error: ").pop().replace(/^row 0: /, "").replace(/\.$/, "");
  } catch {
    return "the server gives no reason";
  }
}

/** Show the parts of the photograph that the reading depends on, or hide them again. */
async function toggleExplanation() {
  const shown = page("overlay").hidden;
  hideExplanation();
  if (!shown) return;
  page("explain").setAttribute("aria-pressed", "true");
  const { signal } = work;
  try {
    const { explanation } = await post(photograph, signal, { params: { explain: true } });
    if (signal.aborted || page("explain").getAttribute("aria-pressed") === "false") return;
    if (!explanation) throw new Trouble("This version of the model cannot show what it looks at.");
    drawOverlay(explanation);
  } catch (trouble) {
    if (!signal.aborted) showTrouble(trouble);
  }
}

/** Draw an occlusion map in red: the more opaque, the more the reading depends on that part. */
function drawOverlay(rows) {
  const overlay = page("overlay");
  [overlay.width, overlay.height] = [rows[0].length, rows.length];
  const cells = rows.flat();
  const highest = Math.max(...cells, Number.EPSILON);
  const pixels = cells.flatMap((cell) => [220, 30, 20, 170 * Math.max(0, cell / highest)]);
  overlay.getContext("2d").putImageData(new ImageData(Uint8ClampedArray.from(pixels), overlay.width), 0, 0);
  overlay.hidden = false;
}

function hideExplanation() {
  page("overlay").hidden = true;
  page("explain").setAttribute("aria-pressed", "false");
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Trouble("The file cannot be read. Choose it again."));
    reader.readAsDataURL(blob);
  });
}

/* What the page shows */

/** Show one of the frame's contents: `empty`, `photograph` or `video`. */
function showInFrame(id) {
  for (const name of ["empty", "photograph", "video"]) page(name).hidden = name !== id;
  page("frame").classList.toggle("filled", id !== "empty");
}

function showEmpty(words) {
  page("invitation").textContent = words;
  page("kinds").hidden = words !== EMPTY;
  showInFrame("empty");
}

function showPhotograph(blob) {
  const image = page("photograph");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  showInFrame("photograph");
}

function clearReading(words) {
  for (const id of ["digit", "advice", "result", "trouble", "again", "access", "explaining", "correction", "thanks"]) page(id).hidden = true;
  hideExplanation();
  if (page("summary").textContent !== words) page("summary").textContent = words; // screen readers speak what changes
}

function showTrouble(trouble) {
  clearReading("Not read.");
  page("words").textContent = trouble.message;
  page("trouble").hidden = false;
  page("again").hidden = !trouble.again || stream !== null; // a live reading goes on by itself
  page("access").hidden = !trouble.asksForToken;
  if (trouble.asksForToken) page("token").focus();
  comeIntoView();
}

/** Show an answer; a live one without what changes all the time or moves the page. */
function showAnswer({ label, probability, probabilities, is_outlier, version }, { live = false } = {}) {
  const readsDigits = Object.keys(probabilities).every((name) => /^[0-9]$/.test(name));
  if (is_outlier) {
    clearReading(readsDigits ? "No hand recognised." : "Not recognised.");
    page("advice").hidden = false;
  } else {
    const isUnsure = probability < 0.5;
    const words = readsDigits ? `The hand ${isUnsure ? "may sign" : "signs"}` : `This ${isUnsure ? "may be" : "is"}:`;
    const share = percent(probability).replace("> ", "more than ");
    clearReading(`${words} ${label}${live ? "" : `, with a probability of ${share}`}.`);
    page("digit").textContent = label;
    page("digit").hidden = false;
    page("probabilities").replaceChildren(
      ...Object.entries(probabilities).map(([name, share]) => line(name, share, name === label)),
    );
    page("version").textContent = version ? `Answered by version ${version} of the model.` : "";
    page("result").hidden = false;
  }
  page("explaining").hidden = live || page("photograph").hidden;
  if (live) return;
  offerCorrection(Object.keys(probabilities), label);
  comeIntoView();
}

/** Let the visitor say which label is right, if this server takes corrections. */
async function offerCorrection(names, label) {
  const { signal } = work;
  const { takes_corrections } = await settings;
  if (signal.aborted || !takes_corrections) return;
  page("label").replaceChildren(...names.map((name) => new Option(name, name, false, name === label)));
  page("correction").hidden = false;
}

/** On a telephone the reading stands below the photograph. */
function comeIntoView() {
  page("reading").scrollIntoView({ block: "nearest" });
}

/** A line of the table: the class, its bar, its probability. */
function line(name, share, best) {
  const [row, head, track, bar] = ["tr", "th", "div", "div"].map((tag) => document.createElement(tag));
  row.classList.toggle("best", best);
  head.scope = "row";
  head.textContent = name;
  track.className = "track";
  bar.className = "bar";
  bar.style.width = `${100 * share}%`; // set from here: the content policy allows no style attribute
  track.append(bar);
  row.append(head);
  row.insertCell().append(track);
  row.insertCell().textContent = percent(share);
  return row;
}

/** A share as a visitor reads it: never rounded to certainty. */
function percent(share) {
  if (share < 0.001) return "< 0.1 %";
  if (share > 0.999) return "> 99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}
