/** A host that does what the next line of its script says, and remembers what it was sent. */

import { createServer } from "node:http";

export const TOKEN = "hf_abcdefghijklmnopqrstuvwxyz";
export const RECORD = { generated_text: "Sinus rhythm.", model: "PULSE-7B", processing_method: "pipeline" };
export const COMMENTED = { ...RECORD, comment_text: "Kalbiniz düzenli.", commentary_status: "success" };
export const ERROR_RECORD = { generated_text: "", error: "No.", model: "PULSE-7B", handler: "h", success: false };

/** Starts a host; each request takes the next of `script`, the last one for ever. */
export async function standIn(...script) {
  const host = { script: script.length > 0 ? script : [reply()], requests: [], closed: undefined };
  const server = createServer((request, response) => {
    const pieces = [];
    request.on("data", (piece) => pieces.push(piece));
    request.on("end", () => {
      const body = JSON.parse(Buffer.concat(pieces).toString());
      host.requests.push({ headers: request.headers, body });
      const behaviour = host.script.length > 1 ? host.script.shift() : host.script[0];
      behaviour(response, request);
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  host.url = `http://127.0.0.1:${server.address().port}`;
  host.bodies = () => host.requests.map(({ body }) => body);
  host.close = () => {
    server.closeAllConnections?.();
    return new Promise((resolve) => server.close(resolve));
  };
  return host;
}

export function raw(status, body, headers = {}) {
  return (response) => response.writeHead(status, { "Content-Type": "application/json", ...headers }).end(body);
}

export function reply(...records) {
  return raw(200, JSON.stringify(records.length > 0 ? records : [RECORD]));
}

export function refusal(status, headers = {}) {
  return raw(status, JSON.stringify([ERROR_RECORD]), headers);
}

export function silent() {}

export function dropped(response) {
  response.socket.destroy();
}

export function cut(response) {
  response.writeHead(200, { "Content-Type": "application/json", "Content-Length": 9999 });
  response.write('[{"generated_text"', () => response.socket.destroy());
}

export function dripping(response) {
  response.writeHead(200, { "Content-Type": "application/json" });
  const timer = setInterval(() => response.write(" "), 20);
  response.on("close", () => clearInterval(timer));
}

export function event(name, data) {
  return `event: ${name}\ndata: ${JSON.stringify(data)}\n\n`;
}

export const STREAM = [
  event("start", { id: "r1", model: "PULSE-7B" }),
  ": keep-alive\n\n",
  event("text", { text: "Sinüs " }),
  event("text", { text: "rhythm." }),
  event("later", { unknown: true }),
  event("answer", RECORD),
  event("record", COMMENTED),
];
export const EVENTS = [
  { type: "start", id: "r1", model: "PULSE-7B" },
  { type: "text", text: "Sinüs " },
  { type: "text", text: "rhythm." },
  { type: "answer", record: RECORD },
  { type: "record", record: COMMENTED },
];

/** A stream of these pieces; `then` comes before its proper end, and may leave that out by returning false. */
export function streamed(pieces, then = () => true) {
  return async (response, request) => {
    response.writeHead(200, { "Content-Type": "text/event-stream", "X-Request-Id": "r-2" });
    for (const piece of pieces) response.write(piece);
    if ((await then(response, request)) !== false) response.end();
  };
}

/** Runs `act` with every wait of less than a minute skipped; returns how long they would have been, in milliseconds. */
export async function withoutWaiting(act) {
  const real = globalThis.setTimeout;
  const waits = [];
  globalThis.setTimeout = (callback, ms, ...rest) => {
    if (ms >= 60_000) return real(callback, ms, ...rest);
    waits.push(ms);
    return real(callback, 0, ...rest);
  };
  try {
    await act();
  } finally {
    globalThis.setTimeout = real;
  }
  return waits;
}

export async function collected(events) {
  const found = [];
  for await (const each of events) found.push(each);
  return found;
}
