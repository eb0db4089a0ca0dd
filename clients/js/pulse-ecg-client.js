/**
 * Client of a PULSE-7B endpoint, which reads ECG images: the custom handler in the stock container of Hugging Face
 * Inference Endpoints, or this project's own server.  For browsers and Node.js 18 or later; types in
 * pulse-ecg-client.d.ts.
 */

export const MAX_IMAGE_BYTES = 20_000_000;

// Enough for an endpoint that sleeps: its replica loads 14 GB before it answers.
const DEFAULT_TIMEOUT_MS = 600_000;
const LONGEST_TIMEOUT_MS = 2 ** 31 - 1; // what setTimeout can wait

const PARAMETERS = {
  maxNewTokens: "max_new_tokens",
  temperature: "temperature",
  topP: "top_p",
  topK: "top_k",
  doSample: "do_sample",
  repetitionPenalty: "repetition_penalty",
  stop: "stop",
  returnFullText: "return_full_text",
  enableTurkishCommentary: "enable_turkish_commentary",
  deepseekTimeout: "deepseek_timeout",
  seed: "seed",
  details: "details",
};
const TEXT_DEFAULTS = {
  maxNewTokens: 256,
  temperature: 0.7,
  topP: 0.95,
  doSample: true,
  enableTurkishCommentary: true,
};
const IMAGE_DEFAULTS = {
  maxNewTokens: 512,
  temperature: 0.2,
  topP: 0.9,
  doSample: true,
  repetitionPenalty: 1.05,
  enableTurkishCommentary: true,
  deepseekTimeout: 30,
};
const COMMENTARY_FIELDS = [
  "comment_text",
  "commentary_model",
  "commentary_tokens",
  "commentary_status",
  "commentary_error",
  "commentary_warnings",
];

// The endpoint did not begin to answer: it is busy (429), has no replica yet, or sleeps (502, 503).
const RETRIED_STATUSES = new Set([429, 502, 503]);
// Node.js says that nothing was sent; a browser does not tell, so there a broken connection is final.
const NOT_CONNECTED = new Set([
  "ECONNREFUSED",
  "ENOTFOUND",
  "EAI_AGAIN",
  "EHOSTUNREACH",
  "ENETUNREACH",
  "UND_ERR_CONNECT_TIMEOUT",
]);
// A host that is not there so many times in a row is a wrong URL or a broken network, not a sleeping endpoint.
const MOST_CONNECTION_ATTEMPTS = 4;

const SIGNATURES = {
  "\xff\xd8\xff": "image/jpeg",
  "\x89PNG\r\n\x1a\n": "image/png",
  GIF8: "image/gif",
  BM: "image/bmp",
  RIFF: "image/webp",
  "II*\0": "image/tiff",
  "MM\0*": "image/tiff",
};

/** What a call fails with; an abort by the caller's own signal is passed on as it is. */
export class PULSEError extends Error {
  constructor(message, { kind, status, text = "", records = [], requestId, cause } = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "PULSEError";
    Object.assign(this, { kind, status, text, records, requestId });
  }
}

export class PULSEEndpoint {
  #url;
  #token;
  #timeoutMs;
  #onRetry;
  #fetch;
  #streams = true;

  constructor(endpointUrl, hfToken, { timeoutMs = DEFAULT_TIMEOUT_MS, onRetry, fetch } = {}) {
    this.#url = checkedUrl(endpointUrl);
    this.#token = checkedToken(hfToken);
    this.#timeoutMs = checkedTimeout(timeoutMs);
    this.#onRetry = onRetry;
    this.#fetch = fetch ?? ((...request) => globalThis.fetch(...request));
  }

  async analyzeText(text, parameters = {}, options = {}) {
    return (await this.#records(text, withDefaults(parameters, TEXT_DEFAULTS), options))[0];
  }

  async analyzeImageUrl(imageUrl, query, parameters = {}, options = {}) {
    return (await this.#records({ query, image: imageUrl }, withDefaults(parameters, IMAGE_DEFAULTS), options))[0];
  }

  async analyzeImageBase64(imageFile, query, parameters = {}, options = {}) {
    return (await this.#records({ query, image: imageFile }, withDefaults(parameters, IMAGE_DEFAULTS), options))[0];
  }

  async chat(messages, parameters = {}, options = {}) {
    return (await this.#records({ messages }, parameters, options))[0];
  }

  async analyzeBatch(inputs, parameters = {}, options = {}) {
    if (typeof inputs === "string") throw new TypeError("analyzeBatch takes a list of inputs, not a string.");
    return this.#records([...inputs], parameters, options);
  }

  stream(input, parameters = {}, options = {}) {
    return this.#stream(input, wireParameters(parameters), this.#timeout(options), options.signal);
  }

  async *#stream(input, parameters, timeoutMs, signal) {
    const call = new Call(timeoutMs, signal);
    try {
      let record;
      if (this.#streams) {
        const response = await this.#post(call, { ...(await body(input, parameters)), stream: true });
        if (response.headers.get("content-type")?.startsWith("text/event-stream")) {
          yield* this.#events(call, response);
          return;
        }
        // No stream, so the host knows none.  Ours refuses the unknown key there; another may just have answered.
        [record] = await this.#read(call, response, 1);
      }
      if (record === undefined || "error" in record) {
        [record] = await this.#read(call, await this.#post(call, await body(input, parameters)), 1);
      }
      if ("error" in record) {
        throw refusal(record);
      }
      this.#streams = false;
      yield* wholeAnswer(record);
    } finally {
      call.end();
    }
  }

  async #records(inputs, parameters, options) {
    const call = new Call(this.#timeout(options), options.signal);
    try {
      const response = await this.#post(call, await body(inputs, wireParameters(parameters)));
      return await this.#read(call, response, Array.isArray(inputs) ? inputs.length : 1);
    } finally {
      call.end();
    }
  }

  /** A response with status 200 whose body is still to be read; asked for again while the endpoint sleeps. */
  async #post(call, content) {
    const text = JSON.stringify(content);
    let unconnected = 0; // in a row
    for (let attempt = 1; ; attempt += 1) {
      const { response, error, retryAfterMs } = await this.#attempt(call, text);
      if (response) return response;
      const delayMs = delayBefore(attempt, retryAfterMs);
      unconnected = error.kind === "connection" ? unconnected + 1 : 0;
      if (unconnected === MOST_CONNECTION_ATTEMPTS || delayMs >= call.leftMs) throw error;
      this.#onRetry?.({ error, attempt, delayMs, leftMs: call.leftMs });
      await call.pause(delayMs);
    }
  }

  /** The response, or an error after which the request may be sent again; any other error is thrown. */
  async #attempt(call, text) {
    let response;
    try {
      response = await call.within(this.#fetch(this.#url.href, this.#request(call, text)));
    } catch (error) {
      const failure = this.#broken(call, error);
      if (failure === error || !notConnected(error.cause)) throw failure;
      return { error: failure };
    }
    if (response.status === 200) return { response };
    const error = await this.#statusError(call, response);
    if (!RETRIED_STATUSES.has(response.status)) throw error;
    return { error, retryAfterMs: retryAfter(response.headers.get("retry-after")) };
  }

  #request(call, text) {
    // The stock container looks both types up as they stand: no charset, no list of types.
    const headers = { "Content-Type": "application/json", Accept: "application/json" };
    if (this.#token) headers.Authorization = `Bearer ${this.#token}`;
    // A redirect would take the token and the image to a host that nobody named.
    return { method: "POST", headers, body: text, redirect: "manual", signal: call.signal };
  }

  async #read(call, response, count) {
    const text = await this.#received(call, response.text());
    const records = recordsIn(text);
    if (records?.length === count) return records;
    if (records?.length === 1 && "error" in records[0]) throw refusal(records[0]); // the whole batch
    const message = records
      ? `The reply has ${records.length} records instead of ${count}.`
      : "The reply is no list of records; is this the URL of a PULSE endpoint?";
    throw new PULSEError(message, { kind: "reply", status: 200, text: this.#safe(text) });
  }

  async #statusError(call, response) {
    const { status, headers } = response;
    const requestId = headers.get("x-request-id") ?? undefined;
    if (response.type === "opaqueredirect" || (status >= 300 && status < 400)) {
      const message = `HTTP ${status}: the endpoint redirects; redirects are not followed.`;
      return new PULSEError(message, { kind: "status", status, requestId });
    }
    return statusError(status, this.#safe(await this.#received(call, response.text())), requestId);
  }

  async *#events(call, response) {
    const decoder = new EventDecoder();
    const requestId = response.headers.get("x-request-id") ?? undefined;
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await this.#received(call, reader.read());
      if (done) break;
      for (const { name, data } of decoder.feed(value)) {
        const event = streamEvent(name, data, requestId);
        if (event) yield event;
        if (event?.type === "record") return;
      }
    }
    throw new PULSEError("The stream ended before the answer was complete.", { kind: "reply", status: 200 });
  }

  async #received(call, promise) {
    try {
      return await call.within(promise);
    } catch (error) {
      throw this.#broken(call, error);
    }
  }

  /** What fetch threw, as an error of ours; what the call itself ended with stays as it is. */
  #broken(call, error) {
    if (call.signal.aborted) return error;
    const cause = error?.cause ?? error;
    const words = [error?.message, cause === error ? "" : (cause.message ?? cause.code)].filter(Boolean).join(": ");
    const message = this.#safe(`No complete reply from ${this.#url.origin} (${words}).`);
    return new PULSEError(message, { kind: "connection", cause: error });
  }

  /** Text for messages and errors: a host that shows a request's headers shows them without the token. */
  #safe(text) {
    // A shorter token is a word like any other, which a caller tries a local server with.
    return this.#token?.length >= 8 ? text.replaceAll(this.#token, "***") : text;
  }

  #timeout({ timeoutMs = this.#timeoutMs }) {
    return checkedTimeout(timeoutMs);
  }
}

/** The part of a chat message that shows an image. */
export async function imagePart(image) {
  return { type: "image_url", image_url: { url: await imageSource(image) } };
}

// --- one call

/** A deadline and the caller's signal, made one; whatever is awaited within ends with either. */
class Call {
  #controller = new AbortController();
  #ended;
  #timer;
  #until;
  #cancel;
  #callers;

  constructor(timeoutMs, callers) {
    this.#until = Date.now() + timeoutMs;
    this.#callers = callers;
    this.#ended = new Promise((_, reject) => {
      this.signal.addEventListener("abort", () => reject(this.signal.reason), { once: true });
    });
    this.#ended.catch(() => {}); // it may end while nothing is awaited
    this.#cancel = () => this.#controller.abort(callers.reason);
    const message = `The endpoint did not answer within ${timeoutMs / 1000} seconds.`;
    this.#timer = setTimeout(() => this.#controller.abort(new PULSEError(message, { kind: "timeout" })), timeoutMs);
    if (callers?.aborted) this.#cancel();
    callers?.addEventListener("abort", this.#cancel, { once: true });
  }

  get signal() {
    return this.#controller.signal;
  }

  get leftMs() {
    return this.#until - Date.now();
  }

  async within(promise) {
    return Promise.race([this.#ended, promise]);
  }

  async pause(ms) {
    let timer;
    try {
      await this.within(new Promise((resolve) => (timer = setTimeout(resolve, ms))));
    } finally {
      clearTimeout(timer);
    }
  }

  /** Let go of timer, signal, and a connection whose reply was not read to its end. */
  end() {
    clearTimeout(this.#timer);
    this.#callers?.removeEventListener("abort", this.#cancel);
    this.#controller.abort();
  }
}

// --- requests

async function body(inputs, parameters) {
  const plain = Array.isArray(inputs) ? await Promise.all(inputs.map(plainInput)) : await plainInput(inputs);
  return Object.keys(parameters).length > 0 ? { inputs: plain, parameters } : { inputs: plain };
}

/** An input with its image as a string. */
async function plainInput(input) {
  const hasImage = typeof input === "object" && input !== null && "image" in input;
  return hasImage ? { ...input, image: await imageSource(input.image) } : input;
}

/** The parameters that are given, and the method's own for the others. */
function withDefaults(parameters, defaults) {
  const given = Object.entries(parameters ?? {}).filter(([, value]) => value !== undefined);
  return { ...defaults, ...Object.fromEntries(given) };
}

function wireParameters(parameters) {
  const wire = {};
  for (const [name, value] of Object.entries(parameters)) {
    if (!Object.hasOwn(PARAMETERS, name)) {
      throw new TypeError(`Unknown parameter '${name}'; known: ${Object.keys(PARAMETERS).join(", ")}.`);
    }
    if (value !== undefined && value !== null) wire[PARAMETERS[name]] = value;
  }
  return wire;
}

/** A URL or data URI as it is; a File, a Blob or bytes as a data URI. */
async function imageSource(image) {
  if (typeof image === "string" && /^https?:\/\//i.test(image)) return image;
  if (typeof image === "string" && /^data:/i.test(image)) {
    checkSize(Math.floor(((image.length - image.indexOf(",") - 1) * 3) / 4));
    return image;
  }
  const bytes = await bytesOf(image);
  checkSize(bytes.length);
  return `data:${imageType(bytes)};base64,${base64(bytes)}`;
}

async function bytesOf(image) {
  const kind = Object.prototype.toString.call(image).slice(8, -1); // of another window's objects too
  if (kind === "Blob" || kind === "File") {
    checkSize(image.size); // before it is read
    try {
      return new Uint8Array(await image.arrayBuffer());
    } catch (cause) {
      throw new PULSEError("The image could not be read; was the file changed or moved?", { kind: "image", cause });
    }
  }
  if (kind === "ArrayBuffer") return new Uint8Array(image);
  if (ArrayBuffer.isView(image)) return new Uint8Array(image.buffer, image.byteOffset, image.byteLength);
  const accepted = "accepted: a File, a Blob, an ArrayBuffer, a Uint8Array or Buffer, an http(s) URL or a data URI";
  throw new PULSEError(`The image is no image that can be sent; ${accepted}.`, { kind: "image" });
}

function checkSize(size) {
  if (size === 0) throw new PULSEError("The image is empty.", { kind: "image" });
  if (size <= MAX_IMAGE_BYTES) return;
  const message = `The image has ${size} bytes; at most ${MAX_IMAGE_BYTES} are accepted.`;
  throw new PULSEError(message, { kind: "image" });
}

function imageType(bytes) {
  const begin = String.fromCharCode(...bytes.subarray(0, 8));
  const found = Object.entries(SIGNATURES).find(([signature]) => begin.startsWith(signature));
  return found ? found[1] : "application/octet-stream";
}

function base64(bytes) {
  const step = 0x6000; // a multiple of 3, so that the pieces join, and few enough arguments for one call
  const pieces = [];
  for (let at = 0; at < bytes.length; at += step) {
    pieces.push(btoa(String.fromCharCode(...bytes.subarray(at, at + step))));
  }
  return pieces.join("");
}

function checkedUrl(given) {
  const text = String(given).trim();
  // A page may name a path of its own host; a host without its scheme must not become one.
  const base = /^\.{0,2}\//.test(text) ? globalThis.location?.href : undefined;
  let url;
  try {
    url = new URL(text, base);
  } catch {
    url = undefined;
  }
  if (!["http:", "https:"].includes(url?.protocol)) {
    throw new TypeError("The endpoint's URL must begin with https:// (or http://) and name a host.");
  }
  if (url.username || url.password) {
    throw new TypeError("The endpoint's URL must not hold a user name or password.");
  }
  return url;
}

function checkedToken(token) {
  const text = String(token ?? "").trim();
  if (!/^[!-~]*$/.test(text)) throw new TypeError("The token holds characters that cannot be in a token.");
  return text;
}

function checkedTimeout(timeoutMs) {
  if (timeoutMs > 0 && timeoutMs <= LONGEST_TIMEOUT_MS) return timeoutMs;
  throw new RangeError(`timeoutMs is ${timeoutMs}; it must be a number from 1 to ${LONGEST_TIMEOUT_MS}.`);
}

// --- again, or not

/** Milliseconds to wait after the attempt-th failure: what the server asked for, or twice as long each time. */
function delayBefore(attempt, retryAfterMs) {
  if (retryAfterMs) return retryAfterMs * (1 + Math.random() / 4);
  return Math.min(15_000, 500 * 2 ** Math.min(attempt - 1, 10)) * (0.5 + Math.random() / 2);
}

/** The header Retry-After (RFC 9110, 10.2.3) in milliseconds from now; undefined where there is none to be read. */
function retryAfter(value) {
  if (value === null) return undefined;
  if (/^\s*\d+\s*$/.test(value)) return Number(value) * 1000;
  const moment = /[a-z]/i.test(value) ? Date.parse(value) : NaN;
  return Number.isNaN(moment) ? undefined : Math.max(0, moment - Date.now());
}

// --- replies

/** Whether what fetch gave as its cause says that no connection was made; of several addresses, to none of them. */
function notConnected(cause) {
  if (cause?.errors?.length > 0) return cause.errors.every((error) => error?.syscall === "connect");
  return NOT_CONNECTED.has(cause?.code);
}

/** The error of a request that was refused as a whole with status 200, as the stock container does. */
function refusal(record) {
  const text = JSON.stringify([record]);
  return new PULSEError(String(record.error), { kind: "status", status: 200, text, records: [record] });
}

function statusError(status, text, requestId) {
  const document = json(text);
  const first = Array.isArray(document) ? document[0] : document;
  const said = typeof first?.error === "string" ? first.error : text;
  const words = said.split(/\s+/).filter(Boolean).join(" ");
  const message = `HTTP ${status}: ${words.length > 500 ? `${words.slice(0, 499)}…` : words}`;
  return new PULSEError(message, { kind: "status", status, text, records: recordsIn(text), requestId });
}

/** The records of a body; undefined where it is no list of them. */
function recordsIn(text) {
  const document = json(text);
  const isList = Array.isArray(document) && document.every((item) => typeof item === "object" && item !== null);
  return isList ? document : undefined;
}

function json(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

// --- streams

/** Server-sent events (WHATWG HTML, 9.2.6) out of a body's pieces; one may end anywhere, within a character too. */
class EventDecoder {
  #text = new TextDecoder();
  #rest = "";
  #afterReturn = false;
  #name = "";
  #data = [];

  *feed(piece) {
    const text = this.#text.decode(piece, { stream: true });
    if (!text) return;
    const isHalfEnd = this.#afterReturn && text.startsWith("\n"); // of a line that ended with the last piece
    this.#afterReturn = text.endsWith("\r");
    const lines = (this.#rest + (isHalfEnd ? text.slice(1) : text)).split(/\r\n|\n|\r/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line) this.#take(line);
      else if (this.#data.length > 0) yield { name: this.#name, data: this.#data.join("\n") };
      if (!line) [this.#name, this.#data] = ["", []];
    }
  }

  #take(line) {
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line); // a comment has an empty name
    if (name === "event") this.#name = value;
    if (name === "data") this.#data.push(value);
  }
}

/** The event as callers get it; undefined for one that a later version of the server may add. */
function streamEvent(name, text, requestId) {
  const data = json(text);
  const isObject = typeof data === "object" && data !== null && !Array.isArray(data);
  if (name === "start" && isObject) return { type: "start", id: data.id, model: data.model };
  if (name === "text" && typeof data?.text === "string") return { type: "text", text: data.text };
  if ((name === "answer" || name === "record") && isObject) return { type: name, record: data };
  if (name === "error" && Number.isInteger(data?.status)) {
    const { status, ...record } = data;
    throw statusError(status, JSON.stringify([record]), requestId);
  }
  if (!["start", "text", "answer", "record", "error"].includes(name)) return undefined;
  throw new PULSEError(`The stream holds a malformed event of the kind '${name}'.`, { kind: "reply", status: 200 });
}

/** The events of an answer that came in one piece. */
function* wholeAnswer(record) {
  yield { type: "start", id: "", model: record.model };
  if (record.generated_text) yield { type: "text", text: record.generated_text };
  const fields = Object.entries(record).filter(([name]) => !COMMENTARY_FIELDS.includes(name));
  yield { type: "answer", record: Object.fromEntries(fields) };
  yield { type: "record", record };
}
