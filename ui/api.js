// The server's streamed route: what is sent, what comes back, and how it can fail.

import { serverSentEvents } from "./sse.js";

/** The folder above this file's: the server's root, also behind a proxy's path prefix. */
export const ENDPOINT = new URL("../", import.meta.url).href;

/** What the server asks the model when an image comes without a question. */
export const DEFAULT_QUESTION = "Please write a clinical report based on this ECG image.";

/**
 * A request that got no (complete) answer.
 * `kind` is "refused" (the server said why, in `message`), "unreachable", "broken" (the stream ended early), or
 * "unreadable" (the image file is gone).
 */
export class RequestFailed extends Error {
  constructor(kind, { message = "", status = 0, retryAfter = null, requestId = "" } = {}) {
    super(message);
    Object.assign(this, { kind, status, retryAfter, requestId });
  }
}

/** The `inputs` of a request; `history` holds the earlier `{question, answer}` pairs about the same image. */
export function requestInputs({ question, image, history }) {
  if (!history.length) return image ? { query: question, image } : { query: question };
  const messages = [...history, { question }].flatMap((turn) => [
    { role: "user", content: turn.question },
    ...("answer" in turn ? [{ role: "assistant", content: turn.answer }] : []),
  ]);
  if (image) {
    messages[0].content = [
      { type: "text", text: messages[0].content },
      { type: "image_url", image_url: { url: image } },
    ];
  }
  return { messages };
}

/**
 * Sends a request and yields its events, `{type, data}`: start, text, answer and record, which is the last.
 * Throws RequestFailed, or an AbortError once `signal` is aborted.
 */
export async function* ask(body, { token, signal }) {
  const response = await reached(signal, "unreachable", () =>
    fetch(ENDPOINT, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) },
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    }),
  );
  if (!response.ok) throw await refusal(response);
  const requestId = response.headers.get("X-Request-Id") ?? "";
  const events = serverSentEvents(response.body);
  for (;;) {
    const { value: event, done } = await reached(signal, "broken", () => events.next());
    if (done) throw new RequestFailed("broken", { requestId });
    const data = JSON.parse(event.data);
    if (event.type === "error") {
      throw new RequestFailed("refused", { message: data.error, status: data.status, requestId });
    }
    yield { type: event.type, data };
    if (event.type === "record") return;
  }
}

/** Network errors as ours; only the caller's own abort passes as it is. */
async function reached(signal, kind, action) {
  try {
    return await action();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new RequestFailed(kind);
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null); // a proxy in between answers in HTML
  const record = Array.isArray(body) ? body[0] : body;
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new RequestFailed("refused", {
    message: typeof record?.error === "string" ? record.error : "",
    status: response.status,
    retryAfter: Number.isNaN(seconds) ? null : seconds,
    requestId: response.headers.get("X-Request-Id") ?? "",
  });
}
