// Two languages.  Elements name their text in `data-i18n`, its values in `data-i18n-values`, so that a switch reaches
// them all; texts are set as text, never as HTML.

import { STRINGS } from "./strings.js";

const STORED = "pulse-ui-language";
const TRANSLATED_ATTRIBUTES = ["placeholder", "aria-label", "alt"];

let language = "en";

/**
 * The text of `key`; `{name}` in it stands for a value, numbers are written as the language writes them.
 * A name of the server's that is not known here, such as a new stage, is shown as it is.
 */
export function translated(key, values = {}) {
  const text = STRINGS[language][key] ?? key.slice(key.indexOf(".") + 1);
  return text.replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return typeof value === "number" ? value.toLocaleString(language, { maximumFractionDigits: 2 }) : value;
  });
}

/** Gives an element a text that follows the language. */
export function say(element, key, values = {}) {
  element.dataset.i18n = key;
  element.dataset.i18nValues = JSON.stringify(values);
  setText(element, translated(key, values));
}

/** Gives an element a text that no language changes (or none). */
export function sayPlain(element, text = "") {
  delete element.dataset.i18n;
  setText(element, text);
}

/** Gives an element an attribute that follows the language. */
export function sayAttribute(element, attribute, key) {
  element.setAttribute(`data-i18n-${attribute}`, key);
  element.setAttribute(attribute, translated(key));
}

/** A text that stays the same is left alone: screen readers would announce it again. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Translates an element and all below it. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-i18n]")) {
    say(element, element.dataset.i18n, JSON.parse(element.dataset.i18nValues ?? "{}"));
  }
  for (const attribute of TRANSLATED_ATTRIBUTES) {
    for (const element of root.querySelectorAll(`[data-i18n-${attribute}]`)) {
      sayAttribute(element, attribute, element.getAttribute(`data-i18n-${attribute}`));
    }
  }
}

/** Switches the page's language. */
export function setLanguage(chosen) {
  language = chosen;
  document.documentElement.lang = chosen;
  document.title = translated("page.title");
  translate(document);
}

/** Remembers the language for the next visit, where the browser allows that. */
export function rememberLanguage(chosen) {
  try {
    localStorage.setItem(STORED, chosen);
  } catch {
    // Storage can be forbidden; the choice then lasts as long as the page.
  }
}

/** The remembered language, else the browser's, if it is one of ours. */
export function preferredLanguage() {
  try {
    const stored = localStorage.getItem(STORED);
    if (Object.hasOwn(STRINGS, stored)) return stored;
  } catch {
    // As above.
  }
  return navigator.language.startsWith("tr") ? "tr" : "en";
}
