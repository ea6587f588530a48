// Takes photographs from examples, files, drops or the camera, asks the model about them, and shows the answers or the trouble.

import { Trouble, canSee, capture, draw, getCamera, pause, showStream, stop } from "./camera.js";
import { Exercise } from "./exercise.js";
import { SILENT, askAccuracy, correct, describeRequest, keepToken, read, settings } from "./server.js";

const LONGEST_SIDE = 1024; // pixels; the network sees a tenth of it, and a telephone's photograph has 4000
const LIVE_SIDE = 256; // pixels of what is sent while the camera is open
const LIVE_INTERVAL = 250; // milliseconds from one question about the camera's picture to the next, at least
const LOGGED = 10_000; // milliseconds between two live frames that the server logs
const STEADY = 1000; // milliseconds of answers that a live reading is the mean of
const LIVE_PAUSE = 2000; // milliseconds after a refusal
const MARKED = 1000; // milliseconds for which the mark of the exercise is shown

const CAMERA_WORDS = {
  InsecureContext: "Browsers open the camera only for an address that begins with https. Choose a photograph.",
  NotAllowedError: "The camera was refused. Allow it for this page in the browser's settings, or choose a photograph.",
  NotFoundError: "No camera was found. Choose a photograph instead.",
  NotReadableError: "The camera is used by another program. Close that one, or choose a photograph.",
};

// The page's own words suit any classes; these take their place for a model that reads the digits of hands.
const HANDS = {
  title: "Sign digits",
  purpose: "Show a hand that signs a digit from 0 to 9, and the model reads it.",
  "signs-title": "The signs",
  "signs-note": "Choose one, and the model reads it. Then sign one yourself.",
  subject: "one hand before a plain background, filling most of a square;",
  pose: "the palm of either hand towards the camera, the fingers upwards;",
  caption: "Probability of each digit",
  class: "Digit",
};

const page = (id) => document.getElementById(id);

const { max_bytes, media_types, classes, examples, needs_token, reads_hands, takes_corrections } = await settings;

let photograph = null; // the Blob that was sent last, for another attempt, an explanation or a correction
let work = new AbortController(); // what is under way: whatever the visitor does next ends it
let repeat; // what "Send it again" and the token's form do
let stream = null; // the camera's
let exercise = null; // under way
const accuracies = new Map(); // of the versions that have answered, as promises

/* What the visitor sees first */

if (reads_hands) {
  for (const [id, words] of Object.entries(HANDS)) page(id).textContent = words;
  document.title = HANDS.title;
}
for (const [name, address] of Object.entries(examples)) {
  const [item, button, image] = ["li", "button", "img"].map((tag) => document.createElement(tag));
  button.type = "button";
  image.src = address;
  image.alt = "";
  button.append(image, name);
  button.addEventListener("click", () => takeExample(address));
  item.append(button);
  page("examples").append(item);
}
page("signs").hidden = Object.keys(examples).length === 0;
for (const [id, text] of Object.entries(describeRequest(needs_token))) page(id).textContent = text;
page("main").hidden = page("footer").hidden = false; // now, so that nothing moves

/* What the visitor does */

page("choose").addEventListener("click", () => page("file").click());
page("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = ""; // so that the same file can be chosen again
  if (file) take(file);
});

// Anywhere on the page: a browser would leave it for a file that misses a frame.
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    const gone = name === "drop" || (name === "dragleave" && event.relatedTarget === null);
    page("showing").classList.toggle("over", !gone);
  });
}

document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (file) take(file);
  else showTrouble(new Trouble("That was no file. Save the photograph first, then drop the file."));
});

document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) take(file);
});

page("open-camera").addEventListener("click", () => openCamera());
page("practise").addEventListener("click", () => openCamera({ practising: true }));
page("take").addEventListener("click", takePicture);
page("close-camera").addEventListener("click", () => leaveCamera("No photograph yet.", "open-camera"));
page("end-exercise").addEventListener("click", () => leaveCamera("No photograph yet.", "practise"));
page("skip").addEventListener("click", () => {
  exercise?.choose();
  showTask();
});
page("show-hint").addEventListener("click", () => {
  page("hint").hidden = false;
});

page("again").addEventListener("click", () => repeat());

page("explain").addEventListener("click", toggleExplanation);
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input") || event.ctrlKey || event.altKey || event.metaKey;
  if (event.key === "e" && !typing && !page("explaining").hidden) toggleExplanation();
});

page("access").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(page("token").value.trim());
  page("token").value = "";
  repeat();
  page("open-camera").focus(); // the form has gone
});

page("correction").addEventListener("submit", (event) => {
  event.preventDefault();
  sendCorrection();
});

/** End what is under way and begin something else; what awaits must stop when this signal is aborted. */
function begin(words) {
  work.abort();
  work = new AbortController();
  repeat = () => ask(begin("Reading …"));
  clearReading(words);
  return work.signal;
}

/* Files and examples */

async function takeExample(address) {
  closeCamera();
  const signal = begin("Reading …");
  const reply = await fetch(address, { signal }).catch(() => null);
  if (signal.aborted) return;
  if (reply?.ok) await take(await reply.blob());
  else showTrouble(new Trouble(SILENT));
}

/** Show a file's photograph, and ask about it. */
async function take(file) {
  closeCamera();
  const signal = begin("Reading …");
  try {
    const prepared = await prepare(file);
    if (signal.aborted) return;
    photograph = prepared.blob;
    showPhotograph(prepared.shown ? photograph : null);
    await ask(signal);
  } catch (trouble) {
    if (!signal.aborted) showTrouble(trouble);
  }
}

/**
 * What is sent for a file: a smaller JPEG if it is large, or of a kind that only the browser can read. A file that the
 * browser cannot read either goes as it is: the server says what is wrong with it.
 */
async function prepare(file) {
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

async function openCamera({ practising = false } = {}) {
  const signal = begin("Opening the camera …");
  showCamera(practising);
  try {
    const opened = await getCamera(CAMERA_WORDS);
    if (signal.aborted) return stop(opened);
    stream = opened;
    const [track] = stream.getVideoTracks();
    track.addEventListener("ended", () => {
      leaveCamera("Not read.", "open-camera");
      showTrouble(new Trouble("The camera has gone. Connect it again, or choose a photograph."));
    });
    showStream(page("video"), stream);
    page("summary").textContent = "The camera is open.";
    readLive(signal, practising);
  } catch (trouble) {
    if (signal.aborted) return;
    closeCamera();
    showTrouble(trouble);
  }
}

/** Make room for the camera's picture and its reading: from here on nothing moves, and what is not shown keeps its place. */
function showCamera(practising) {
  showInFrame("video");
  page("sources").hidden = page("dropping").hidden = true;
  page("shutter").hidden = practising;
  page("exercise").hidden = !practising;
  page("task").classList.remove("right");
  page("asked").textContent = "One moment …";
  page("round").textContent = "";
  page("advice").hidden = false;
  if (!page("probabilities").rows.length) showProbabilities(Array(classes).fill(["", 0]));
  page("reading").classList.add("steady");
  page(practising ? "skip" : "take").focus();
  const lowest = Math.max(...["frame", "headline"].map((id) => page(id).getBoundingClientRect().bottom));
  if (lowest > innerHeight) page("showing").scrollIntoView();
}

/** Read what the camera sees, one question at a time, until something else begins. */
async function readLive(signal, practising) {
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
      const answer = await read(photograph, signal, { isLive });
      const now = performance.now();
      if (!isLive) logged = now;
      answers = [...answers.filter(({ time }) => now - time < STEADY), { ...answer, time: now }];
      const reading = meanAnswer(answers);
      if (!signal.aborted) showAnswer(reading, { live: true });
      if (!signal.aborted && practising) await practise(reading, now, signal);
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
  await ask(signal);
}

function closeCamera() {
  if (page("video").hidden) return;
  if (stream) stop(stream);
  stream = exercise = null;
  page("video").srcObject = null;
  page("sources").hidden = page("dropping").hidden = false;
  page("shutter").hidden = page("exercise").hidden = true;
  page("reading").classList.remove("steady");
  showInFrame(null);
}

/** Close the camera, which ends the live reading, and the exercise with it. */
function leaveCamera(words, focused) {
  closeCamera();
  begin(words);
  page("advice").hidden = false;
  page(focused).focus();
}

/* The exercise */

/** Take note of a live reading: when it has been right for long enough, mark it and go on. */
async function practise({ label, probabilities, is_outlier }, now, signal) {
  if (!exercise) {
    exercise = new Exercise(Object.keys(probabilities));
    showTask();
  }
  if (!exercise.see(is_outlier ? null : label, now)) return;
  page("task").classList.add("right");
  page("asked").textContent = `Right: ${label}`;
  await pause(MARKED);
  if (signal.aborted) return;
  if (exercise.next()) showTask();
  else leaveCamera("All ten are right. Well done.", "practise");
}

function showTask() {
  if (!exercise) return;
  const { asked, progress } = exercise;
  const article = asked === "8" ? "an" : "a";
  page("task").classList.remove("right");
  page("asked").textContent = reads_hands ? `Sign ${article} ${asked}` : `Show: ${asked}`;
  page("round").textContent = progress;
  page("hint").hidden = true;
  const isShown = Object.hasOwn(examples, asked);
  page("show-hint").hidden = !isShown;
  if (isShown) page("hint").src = examples[asked];
}

/* The question */

/** Ask the server about the photograph and show what it says, unless something else has begun by then. */
async function ask(signal) {
  try {
    const answer = await read(photograph, signal);
    if (!signal.aborted) showAnswer(answer);
  } catch (trouble) {
    if (!signal.aborted) showTrouble(trouble);
  }
}

/** Send the label that the visitor has chosen. */
async function sendCorrection() {
  const { signal } = work;
  const label = page("label").selectedOptions[0].dataset.label ?? null;
  page("correction-trouble").hidden = true;
  try {
    await correct(photograph, label, signal);
    if (signal.aborted) return;
    page("correction").hidden = true;
    page("thanks").hidden = false;
  } catch (trouble) {
    if (signal.aborted) return;
    if (trouble.asksForToken) {
      showTrouble(trouble);
      page("correcting").hidden = false; // with the label that was chosen
      repeat = () => {
        clearTrouble();
        sendCorrection();
      };
    } else {
      page("correction-trouble").textContent = trouble.message;
      page("correction-trouble").hidden = false;
    }
  }
}

/** Show the parts of the photograph that the reading depends on, or hide them again. */
async function toggleExplanation() {
  if (!page("overlay").hidden) return hideExplanation();
  const { signal } = work;
  try {
    const { explanation } = await read(photograph, signal, { params: { explain: true } });
    if (signal.aborted) return;
    if (!explanation) throw new Trouble("This version of the model cannot show what it looks at.");
    drawOverlay(explanation);
    page("explain").textContent = "Hide what it looks at";
    page("key").hidden = false;
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
  page("overlay").hidden = page("key").hidden = true;
  page("explain").textContent = "Show what it looks at";
}

/* What the page shows */

/** Show `photograph` or `video` in the frame; for null, there is no frame. */
function showInFrame(id) {
  for (const name of ["photograph", "video"]) page(name).hidden = name !== id;
  page("frame").hidden = id === null;
  page("not-shown").hidden = true;
}

/** Show a photograph; null: one that this browser cannot show. */
function showPhotograph(blob) {
  const image = page("photograph");
  URL.revokeObjectURL(image.src);
  if (blob) image.src = URL.createObjectURL(blob);
  showInFrame(blob && "photograph");
  page("not-shown").hidden = blob !== null;
}

function clearReading(words) {
  for (const id of ["digit", "advice", "result", "explaining", "correcting", "thanks"]) page(id).hidden = true;
  clearTrouble();
  hideExplanation();
  if (page("summary").textContent !== words) page("summary").textContent = words; // screen readers speak what changes
}

function clearTrouble() {
  for (const id of ["trouble", "again", "access", "correction-trouble"]) page(id).hidden = true;
}

function showTrouble(trouble) {
  clearReading("Not read.");
  page("words").textContent = trouble.message;
  page("trouble").hidden = false;
  page("again").hidden = !trouble.again || stream !== null; // a live reading goes on by itself
  page("access").hidden = !trouble.asksForToken;
  if (trouble.asksForToken) page("token").focus();
  page("trouble").scrollIntoView({ block: "nearest" });
}

/** Show an answer; a live one without what changes all the time. */
function showAnswer({ label, probability, probabilities, is_outlier, version }, { live = false } = {}) {
  if (is_outlier) {
    clearReading(reads_hands ? "No hand recognised." : "Not recognised.");
    page("advice").hidden = false;
  } else {
    const isUnsure = probability < 0.5;
    const words = reads_hands ? `The hand ${isUnsure ? "may sign" : "signs"}` : `This ${isUnsure ? "may be" : "is"}:`;
    clearReading(`${words} ${label}${live ? "" : `, with a probability of ${inWords(probability)}`}.`);
    page("digit").textContent = label;
    page("digit").classList.toggle("word", label.length > 2);
    page("digit").hidden = false;
    showProbabilities(Object.entries(probabilities), label);
    showVersion(version);
    page("result").hidden = false;
  }
  if (live) return;
  page("explaining").hidden = page("photograph").hidden;
  if (takes_corrections) offerCorrection(Object.keys(probabilities));
  page("headline").scrollIntoView({ block: "nearest" }); // on a telephone it stands below the photograph
}

/** Tell which version answered, and how well it reads its test photographs, which is asked once for each. */
async function showVersion(version) {
  if (!accuracies.has(version)) accuracies.set(version, askAccuracy(version).catch(() => null));
  const share = await accuracies.get(version);
  const record = share === null ? "" : `, which reads ${inWords(share)} of its test photographs`;
  page("version").textContent = `Answered by version ${version} of the model${record}.`;
}

/** Let the visitor say which label is right, or that none is. */
function offerCorrection(names) {
  const first = new Option("Choose …", "");
  const none = new Option(reads_hands ? "no hand, or no sign" : "none of these", "none");
  const options = names.map((name, index) => {
    const option = new Option(name, index);
    option.dataset.label = name;
    return option;
  });
  page("label").replaceChildren(first, ...options, none);
  page("correction").hidden = page("correcting").hidden = false;
}

function showProbabilities(entries, best) {
  page("probabilities").replaceChildren(...entries.map(([name, share]) => line(name, share, name === best)));
}

/** A line of the table: the class, its bar, its probability. */
function line(name, share, best) {
  const [row, head, track, bar] = ["tr", "th", "div", "div"].map((tag) => document.createElement(tag));
  row.classList.toggle("best", best);
  head.scope = "row";
  head.textContent = head.title = name; // a long one is cut off
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

function inWords(share) {
  return percent(share).replace("> ", "more than ").replace("< ", "less than ");
}
