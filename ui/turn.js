// One question with its answer, commentary, figures and, if it came to that, its error.

import { say, sayPlain, translate } from "./i18n.js";

const HUNDREDTHS = { minimumFractionDigits: 2, maximumFractionDigits: 2 };
const COUNTS = ["prompt_tokens", "image_tokens", "generated_tokens", "seed", "engine", "model_revision"];

export class Turn {
  element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
  answer = "";
  whole = false; // the answer is; its commentary may still be on its way

  /** `history` is what was asked and answered before, about the same image. */
  constructor({ question, image, history, onAgain }) {
    Object.assign(this, { question, image, history });
    this.#part(".asked").textContent = question;
    this.#part(".again").addEventListener("click", onAgain);
    translate(this.element);
  }

  /** Empties what an earlier attempt left. */
  begin({ commentary }) {
    this.answer = "";
    this.whole = false;
    this.commented = commentary;
    this.#started = performance.now();
    this.#firstText = null;
    for (const text of this.element.querySelectorAll(".text, .model")) sayPlain(text);
    for (const hidden of [".answer .note", ".error", ".facts"]) this.#part(hidden).hidden = true;
    this.#part(".warnings").replaceChildren();
    this.#part(".reply").hidden = false;
    this.#part(".commentary").hidden = !commentary;
    if (commentary) say(this.#part(".commentary .note"), "commentary.waiting");
    this.#busy(true);
  }

  start({ model }) {
    this.#part(".model").textContent = model;
  }

  /** Model text is text: it never becomes HTML. */
  append(text) {
    this.#firstText ??= this.#elapsed();
    this.answer += text;
    this.#part(".answer .text").append(text);
  }

  answered(record) {
    this.whole = true;
    this.#busy(false);
    if (!record.generated_text) this.#note("answer.empty");
    if (record.details?.finish_reason === "length") this.#note("answer.length");
    say(this.#part(".commentary .note"), "commentary.writing");
  }

  completed(record) {
    this.#showCommentary(record);
    this.#showFacts(record.details);
  }

  stopped() {
    this.#busy(false);
    if (!this.whole) this.#note("answer.stopped");
    this.#cutCommentary();
  }

  /** `message` is a `[key, values]` of ours, or the server's own text; `advice` a `[key, values]` or null. */
  failed({ message, advice, requestId, again }) {
    this.#part(".reply").hidden = !this.answer;
    this.#busy(false);
    this.#cutCommentary();
    const [said, advised, reference] = [".message", ".advice", ".reference"].map((part) => this.#part(`.error ${part}`));
    said.removeAttribute("lang");
    if (typeof message === "string") {
      sayPlain(said, message);
      said.lang = "en"; // as all of the server's messages
    } else {
      say(said, ...message);
    }
    if (advice) say(advised, ...advice);
    else sayPlain(advised);
    if (requestId) say(reference, "error.reference", { id: requestId });
    else sayPlain(reference);
    this.#part(".again").hidden = !again;
    this.#part(".error").hidden = false;
  }

  /** Once the conversation has gone on, a failed question is history. */
  passed() {
    this.#part(".again").hidden = true;
  }

  #started;
  #firstText;

  #part(selector) {
    return this.element.querySelector(selector);
  }

  #elapsed() {
    return (performance.now() - this.#started) / 1000;
  }

  /** While text streams in, screen readers wait; they read the answer when it is there. */
  #busy(busy) {
    this.#part(".answer .text").setAttribute("aria-busy", busy);
  }

  #note(key) {
    const note = this.#part(".answer .note");
    say(note, key);
    note.hidden = false;
  }

  #cutCommentary() {
    if (this.#part(".commentary .text").textContent) return;
    say(this.#part(".commentary .note"), this.whole ? "commentary.ended" : "commentary.cut");
  }

  #showCommentary(record) {
    const status = record.commentary_status;
    this.#part(".commentary").hidden = !status;
    if (!status) return;
    const note = this.#part(".commentary .note");
    sayPlain(this.#part(".commentary .text"), record.comment_text);
    if (status === "success") say(note, "commentary.by", { model: record.commentary_model });
    else say(note, `commentary.${status}`, { reason: record.commentary_error });
    const warnings = (record.commentary_warnings ?? []).map(({ detail }) => {
      const item = document.createElement("li");
      item.textContent = detail;
      return item;
    });
    this.#part(".warnings").replaceChildren(...warnings);
    this.#part(".commentary").classList.toggle("failed", status !== "success");
  }

  #showFacts(details = {}) {
    const [total, timings] = [this.#elapsed(), details.timings ?? {}];
    const summary = [
      [`facts.${details.finish_reason ?? "eos"}`],
      ["facts.tokens", { count: details.generated_tokens }],
      ["facts.firstText", { seconds: this.#firstText }],
      ["facts.total", { seconds: total }],
    ]
      .filter(([, values = {}]) => Object.values(values).every((value) => value !== undefined && value !== null))
      .map(([key, values]) => {
        const span = document.createElement("span");
        say(span, key, values);
        return span;
      });
    this.#part(".facts summary").replaceChildren(...summary);
    const longest = Math.max(total, ...Object.values(timings));
    this.#part(".facts tbody").replaceChildren(
      heading("facts.inBrowser"),
      row("facts.browser.firstText", this.#firstText, longest),
      row("facts.browser.total", total, longest),
      heading("facts.onServer"),
      ...Object.entries(timings).map(([stage, seconds]) => row(`facts.${stage}`, seconds, longest)),
      heading("facts.counts"),
      ...COUNTS.filter((name) => name in details).map((name) => row(`facts.${name}`, details[name])),
    );
    this.#part(".facts").hidden = false;
  }
}

function heading(key) {
  const line = document.createElement("tr");
  const cell = line.appendChild(document.createElement("th"));
  cell.colSpan = 3;
  say(cell, key);
  return line;
}

/** A figure; seconds get a bar as long as their part of `longest`. */
function row(key, value, longest) {
  const line = document.createElement("tr");
  const [name, figure, bar] = ["th", "td", "td"].map((tag) => line.appendChild(document.createElement(tag)));
  name.scope = "row";
  say(name, key);
  if (longest === undefined) figure.textContent = value ?? "–";
  else {
    figure.textContent = value === null ? "–" : value.toLocaleString(document.documentElement.lang, HUNDREDTHS);
    bar.appendChild(document.createElement("i")).style.width = `${(100 * value) / longest}%`;
  }
  return line;
}
