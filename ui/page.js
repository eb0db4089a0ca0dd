// The page: what the question's form holds is asked, and every turn of the conversation is shown.

import { ask, DEFAULT_QUESTION, ENDPOINT, RequestFailed, requestInputs } from "./api.js";
import { EXAMPLES } from "./examples.js";
import { preferredLanguage, rememberLanguage, say, sayAttribute, sayPlain, setLanguage } from "./i18n.js";
import { imageContent, ImageInput } from "./image_input.js";
import { IMAGE_FILE, snippet } from "./snippets.js";
import { Turn } from "./turn.js";

const byId = (id) => document.getElementById(id);
const field = (name) => byId("composer").elements[name];

const images = new ImageInput();
let history = []; // what was asked and answered about the image so far
let lastTurn = null;
let running = null; // the AbortController of the request on its way
let token = ""; // in memory alone
let tokenWanted = false;

// --- asking

/** The parameters that the form gives; what it leaves empty is the server's to choose. */
function parameters() {
  const given = { enable_turkish_commentary: field("enable_turkish_commentary").checked, details: true };
  if (!field("do_sample").checked) given.do_sample = false;
  for (const name of ["max_new_tokens", "temperature", "seed"]) {
    if (field(name).value !== "" && !field(name).disabled) given[name] = field(name).valueAsNumber;
  }
  return given;
}

function submit() {
  if (running) return;
  if (!images.check()) {
    say(byId("status"), "status.image");
    return;
  }
  const form = byId("composer");
  if (!form.checkValidity()) {
    byId("parameters").open = true; // what is folded in cannot show its message
    form.reportValidity();
    return;
  }
  const question = byId("question").value.trim() || (images.image && !history.length ? DEFAULT_QUESTION : "");
  if (!question) {
    say(byId("status"), "question.missing");
    byId("question").focus();
    return;
  }
  byId("question").value = "";
  byId("examples").open = false;
  byId("conversation").hidden = false;
  lastTurn?.passed();
  const turn = new Turn({ question, image: images.image, history, onAgain: () => run(turn) });
  byId("turns").append(turn.element);
  run(turn);
}

/** Asks a turn's question and shows what becomes of it. */
async function run(turn) {
  if (running) return;
  lastTurn = turn;
  history = turn.history; // what an earlier attempt was answered is gone from the page too
  const asked = parameters();
  turn.begin({ commentary: asked.enable_turkish_commentary });
  setRunning(new AbortController());
  turn.element.scrollIntoView({ block: "start" });
  say(byId("status"), "status.sending");
  try {
    const inputs = requestInputs({ ...turn, image: await imageContent(turn.image) });
    const events = ask({ inputs, parameters: asked }, { token, signal: running.signal });
    for await (const event of events) show(turn, event);
    say(byId("status"), "status.done");
    remember(turn);
  } catch (error) {
    if (running.signal.aborted) {
      turn.stopped();
      say(byId("status"), "status.stopped");
      remember(turn);
    } else {
      fail(turn, error);
      if (turn.whole) remember(turn);
    }
  } finally {
    setRunning(null);
  }
}

function show(turn, { type, data }) {
  if (type === "start") {
    turn.start(data);
    byId("token-form").hidden = true;
    say(byId("status"), "status.reading");
  } else if (type === "text") {
    if (!turn.answer) say(byId("status"), "status.answering");
    turn.append(data.text);
  } else if (type === "answer") {
    turn.answered(data);
    if (turn.commented) say(byId("status"), "status.commenting");
  } else if (type === "record") {
    turn.completed(data);
  }
}

/** A question with an answer, complete or stopped, goes along with the next one. */
function remember({ question, answer, history: before }) {
  if (answer) history = [...before, { question, answer }];
}

function setRunning(controller) {
  // Focus must not vanish with the button that held it.
  if (!controller && document.activeElement === byId("stop")) byId("question").focus();
  running = controller;
  images.busy = Boolean(controller);
  byId("stop").hidden = !controller;
  byId("ask").setAttribute("aria-disabled", Boolean(controller));
  byId("new").disabled = Boolean(controller);
  renderComposer();
}

// --- failing

function fail(turn, error) {
  if (!(error instanceof RequestFailed)) console.error(error);
  const unauthorised = error.status === 401; // the token's form asks again
  turn.failed({ message: explanation(error, turn), advice: advice(error), requestId: error.requestId, again: !unauthorised });
  say(byId("status"), turn.whole ? "commentary.ended" : "status.failed");
  if (!unauthorised) return;
  tokenWanted = true;
  byId("token-form").hidden = false;
  byId("token").focus();
}

/** The server's own words where it had any, else a `[key, values]`. */
function explanation({ kind, status, message }, { whole }) {
  if (kind === "refused") {
    if (status === 401) return [token ? "error.401.wrong" : "error.401"];
    if (message) return message;
    return status === 429 || status === 503 ? [`error.${status}`] : ["error.status", { status }];
  }
  if (kind === "unreadable") return ["image.unreadable"];
  if (kind === undefined) return ["error.unexpected"];
  if (kind === "broken" && whole) return ["error.broken.after"];
  return [navigator.onLine ? `error.${kind}` : "error.offline"];
}

function advice({ status, retryAfter }) {
  if (status !== 429 && status !== 503) return null;
  return retryAfter ? ["error.later.after", { seconds: retryAfter }] : ["error.later"];
}

// --- what follows from the state

function renderComposer() {
  sayAttribute(byId("question"), "placeholder", history.length ? "question.followUp" : "question.placeholder");
  field("temperature").disabled = field("seed").disabled = !field("do_sample").checked;
  renderSnippet();
}

function renderExamples() {
  const turkish = document.documentElement.lang === "tr";
  const items = EXAMPLES[field("theme").value].map(([english, meaning]) => {
    const item = document.createElement("li");
    const button = item.appendChild(document.createElement("button"));
    button.type = "button";
    button.textContent = turkish ? meaning : english;
    button.addEventListener("click", () => {
      byId("question").value = english; // the language that the model was trained on
      byId("question").focus();
      renderSnippet();
    });
    return item;
  });
  byId("example-list").replaceChildren(...items);
}

/** The question in the form as code; without one the last that was asked, or an example about a file. */
function renderSnippet() {
  if (!byId("code").open) return;
  const written = byId("question").value.trim();
  let shown = { question: written || DEFAULT_QUESTION, image: images.image, history };
  if (!written && !images.image) shown.image = { name: "ecg.jpg", type: "image/jpeg", file: null };
  if (!written && lastTurn) shown = lastTurn;
  const file = shown.image && !shown.image.url ? shown.image : null;
  const inputs = requestInputs({ ...shown, image: file ? IMAGE_FILE : (shown.image?.url ?? null) });
  byId("snippet").textContent = snippet(field("code-language").value, {
    endpoint: ENDPOINT,
    request: { inputs, parameters: parameters() },
    image: file,
    withToken: tokenWanted,
  });
  sayPlain(byId("code-note"));
  if (file) say(byId("code-note"), "code.hint");
}

async function copySnippet() {
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    say(byId("code-note"), "code.copied");
  } catch {
    // Without HTTPS, or without permission.
    getSelection().selectAllChildren(byId("snippet"));
    say(byId("code-note"), "code.select");
  }
}

function startOver() {
  history = [];
  lastTurn = null;
  byId("turns").replaceChildren();
  byId("conversation").hidden = true;
  sayPlain(byId("status"));
  renderComposer();
  byId("question").focus();
}

/** A chat is about one image: with another one it begins anew, below what was said. */
function imageChanged() {
  if (history.length) {
    const line = document.createElement("li");
    line.className = "divider";
    say(line, "turns.newImage");
    byId("turns").append(line);
  }
  history = [];
  lastTurn?.passed();
  lastTurn = null;
  renderComposer();
}

function useLanguage(chosen) {
  setLanguage(chosen);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", button.dataset.language === chosen);
  }
  renderExamples();
}

// --- listening

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("token").value.trim();
  if (!/^[!-~]+$/.test(given)) return say(byId("status"), "error.401.wrong"); // no header can carry it
  token = given;
  byId("question").focus(); // the form goes away once the token is accepted
  if (lastTurn) run(lastTurn);
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", startOver);
byId("composer").addEventListener("input", ({ target }) => (target.name === "theme" ? renderExamples() : renderComposer()));
byId("code").addEventListener("toggle", renderSnippet);
byId("copy").addEventListener("click", copySnippet);
images.addEventListener("change", imageChanged);
for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    useLanguage(button.dataset.language);
    rememberLanguage(button.dataset.language);
  });
}
window.addEventListener("offline", () => say(byId("status"), "error.offline"));
window.addEventListener("online", () => sayPlain(byId("status")));

useLanguage(preferredLanguage());
renderComposer();
