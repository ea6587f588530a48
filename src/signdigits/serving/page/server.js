// The questions to the server, and what its refusals mean in words for the visitor.

import { Trouble } from "./camera.js";

const PATIENCE = 30_000; // milliseconds that an answer may take
const TOKEN = "token"; // its name in the tab's storage

export const SILENT = "The server does not answer. Perhaps it is not running, or the network is down.";
const NO_MODEL = "No model answers at the moment; it may just be starting. Wait a moment, then send it again.";
const WORDS = {
  401: "This server answers only those who know its token.",
  413: "The photograph is too large for this server. Choose a smaller one.",
  429: "Too many photographs in a short time. Wait a moment, then send it again.",
  502: NO_MODEL,
  503: NO_MODEL,
  504: "The model did not answer in time. Wait a moment, then send it again.",
};
const CORRECTION_WORDS = {
  ...WORDS,
  500: "The server could not keep the correction. Send it again later, or tell whoever runs this server.",
  507: "The server has no room for more corrections until someone has reviewed those it has. Send it again another day.",
};

/** max_bytes, media_types, classes (their number), examples, needs_token, reads_hands, takes_corrections. */
export const settings = fetch("settings.json").then((reply) => reply.json());

export function keepToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** The server's answer: { label, probability, probabilities, is_outlier, explanation, version }. Throws Trouble. */
export async function read(blob, signal, { params, isLive = false } = {}) {
  const value = { dataframe_records: [{ image: await base64(blob) }], params };
  const { reply, text } = await send("invocations", value, signal, WORDS, isLive ? { "Live-Frame": "1" } : {});
  try {
    return { ...JSON.parse(text).predictions[0], version: reply.headers.get("Model-Version") };
  } catch {
    throw new Trouble("The server's answer cannot be understood.", { again: true });
  }
}

/** Send a photograph with the label that it should have been given, null for none. Throws Trouble. */
export async function correct(blob, label, signal) {
  await send("corrections", { image: await base64(blob), label }, signal, CORRECTION_WORDS);
}

/** The accuracy of the version that answers on its test photographs; null if it is not known. Throws Trouble. */
export async function askAccuracy(version) {
  const { reply, text } = await exchange("model", { headers: authorization() });
  const known = reply.ok ? JSON.parse(text) : {};
  return known.version === version ? known.test_accuracy : null;
}

/** Post a value as JSON; the reply, and its text. Throws Trouble. */
async function send(target, value, signal, words, more = {}) {
  const headers = { "Content-Type": "application/json", ...authorization(), ...more };
  const { reply, text } = await exchange(target, { method: "POST", headers, body: JSON.stringify(value) }, signal);
  if (!reply.ok) throw refusal(reply.status, text, words);
  return { reply, text };
}

function authorization() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function exchange(target, options, ...signals) {
  const limit = new AbortController();
  setTimeout(() => limit.abort(), PATIENCE);
  try {
    const reply = await fetch(target, { ...options, signal: AbortSignal.any([...signals, limit.signal]) });
    return { reply, text: await reply.text() };
  } catch {
    const words = limit.signal.aborted
      ? `No answer within ${PATIENCE / 1000} seconds. Wait a moment, then send it again.`
      : SILENT;
    throw new Trouble(words, { again: true });
  }
}

/** What a reply other than 200 means. */
function refusal(status, text, words) {
  if (status === 401) {
    const hadToken = sessionStorage.getItem(TOKEN);
    sessionStorage.removeItem(TOKEN);
    return new Trouble(hadToken ? "The server does not know this token." : words[401], { asksForToken: true });
  }
  if (status === 400) return new Trouble(`The photograph cannot be read: ${reason(text)}.`);
  const told = words[status] ?? `The server refused the photograph (${status}): ${reason(text)}.`;
  return new Trouble(told, { again: status === 429 || status >= 500 });
}

/** What the server says, without the row, which is the only one, and without what MLflow puts before it. */
function reason(text) {
  try {
    return JSON.parse(text).message.split("Error: ").pop().replace(/^row 0: /, "").replace(/\.$/, "");
  } catch {
    return "the server gives no reason";
  }
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Trouble("The file cannot be read. Choose it again."));
    reader.readAsDataURL(blob);
  });
}

/** How a program asks this server: the text of a curl command and of a Python script. */
export function describeRequest(needsToken) {
  const url = new URL("invocations", document.baseURI).href;
  const curl = [
    `printf '{"dataframe_records": [{"image": "%s"}]}' "$(base64 < hand.jpg | tr -d '\\n')" |`,
    `  curl ${url} -H 'Content-Type: application/json' --data-binary @-${needsToken ? ' -H "Authorization: Bearer $TOKEN"' : ""}`,
  ];
  const headers = needsToken ? ', headers={"Authorization": f"Bearer {token}"}' : "";
  const python = [
    "import base64, requests",
    ...(needsToken ? ['token = open("token").read().strip()'] : []),
    "",
    'image = base64.b64encode(open("hand.jpg", "rb").read()).decode()',
    `reply = requests.post("${url}", json={"dataframe_records": [{"image": image}]}${headers})`,
    'print(reply.json()["predictions"][0])',
  ];
  return { curl: curl.join("\n"), python: python.join("\n") };
}
