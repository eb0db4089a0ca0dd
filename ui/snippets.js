// The page's request as a program: cURL, Python and JavaScript.  A token is never part of it.

export const TOKEN_PLACEHOLDER = "YOUR_TOKEN";

/**
 * @param request  `{inputs, parameters}`; where the image is a file, its data URI is replaced by `imageFile()`.
 * @param image    null, or the file's `{name, type}`.
 * @param withToken  whether the server asks for a token.
 */
export function snippet(language, { endpoint, request, image, withToken }) {
  return { curl, python, javascript }[language]({ endpoint, request, image, withToken });
}

/** Stands for the file's data URI in a request that is to be shown. */
export const IMAGE_FILE = Symbol("image file");

const MARK = "\u0000image\u0000";

function curl({ endpoint, request, image, withToken }) {
  const body = JSON.stringify(request, (_, value) => (value === IMAGE_FILE ? MARK : value), 2);
  const headers = [
    ...(withToken ? ['-H "Authorization: Bearer $TOKEN"'] : []),
    "-H 'Content-Type: application/json'",
  ];
  const token = withToken ? `TOKEN='${TOKEN_PLACEHOLDER}'\n` : "";
  const call = (data) => [`curl ${shell(endpoint)}`, ...headers, data].join(" \\\n  ") + "\n";
  if (!image) return token + call(`--data-binary ${shell(body)}`);
  const [before, after] = body.split(JSON.stringify(MARK));
  // Piped, since an image is longer than a command line may be.
  return `${token}{
  printf '%s' ${shell(`${before}"data:${image.type};base64,`)}
  base64 < ${shell(image.name)} | tr -d '\\n'
  printf '%s' ${shell(`"${after}`)}
} | ${call("--data-binary @-")}`;
}

function python({ endpoint, request, image, withToken }) {
  const lines = [...(image ? ["import base64", "from pathlib import Path", ""] : []), "import requests", ""];
  if (image) {
    const file = `base64.b64encode(Path(${literal(image.name)}).read_bytes()).decode()`;
    lines.push(`image = "data:${image.type};base64," + ${file}`);
  }
  const headers = withToken ? `    headers={"Authorization": "Bearer ${TOKEN_PLACEHOLDER}"},\n` : "";
  const body = written(request, { true: "True", false: "False", null: "None" }, 1);
  lines.push(
    `response = requests.post(\n    ${literal(endpoint)},\n${headers}    json=${body},\n    timeout=300,\n)`,
    "record = response.json()[0]",
    'print(record.get("error") or record["generated_text"])',
    'print(record.get("comment_text", ""))',
  );
  return `${lines.join("\n")}\n`;
}

function javascript({ endpoint, request, image, withToken }) {
  const lines = ["// An ES module (.mjs) for Node.js 18 and later."];
  if (image) {
    lines.push('import { readFile } from "node:fs/promises";', "");
    lines.push(
      `const image = "data:${image.type};base64," + (await readFile(${literal(image.name)})).toString("base64");`,
    );
  }
  const token = withToken ? `, Authorization: "Bearer ${TOKEN_PLACEHOLDER}"` : "";
  lines.push(
    `const response = await fetch(${literal(endpoint)}, {`,
    '  method: "POST",',
    `  headers: { "Content-Type": "application/json"${token} },`,
    `  body: JSON.stringify(${written(request, { true: "true", false: "false", null: "null" }, 1, "  ")}),`,
    "});",
    "const [record] = await response.json();",
    "console.log(record.error ?? record.generated_text);",
    'console.log(record.comment_text ?? "");',
  );
  return `${lines.join("\n")}\n`;
}

/** JSON's strings are also Python's and JavaScript's. */
const literal = (text) => JSON.stringify(text);

/** In single quotes, where a POSIX shell leaves everything as it is. */
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A JSON value as a literal of a language that names its constants as in `words`. */
function written(value, words, depth, unit = "    ") {
  if (value === IMAGE_FILE) return "image";
  if (value === null || typeof value === "boolean") return words[value];
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const entries = Object.entries(value).map(([key, item]) => {
    const name = Array.isArray(value) ? "" : `${literal(key)}: `;
    return `${unit.repeat(depth + 1)}${name}${written(item, words, depth + 1, unit)},\n`;
  });
  return entries.length ? `${open}\n${entries.join("")}${unit.repeat(depth)}${close}` : open + close;
}
