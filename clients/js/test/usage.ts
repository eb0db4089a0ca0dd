/** Compiled, never run: what the declarations must accept, and what they must not. */

import { imagePart, MAX_IMAGE_BYTES, PULSEEndpoint, PULSEError } from "pulse-ecg-client";
import type { AnswerRecord, StreamEvent } from "pulse-ecg-client";

export async function accepted(file: File, bytes: Uint8Array): Promise<void> {
  const endpoint = new PULSEEndpoint("https://example.org", "hf_token", {
    timeoutMs: 1000,
    onRetry: ({ error, attempt, delayMs, leftMs }) => [error.status, attempt + delayMs + leftMs],
    fetch: globalThis.fetch,
  });
  new PULSEEndpoint(new URL("https://example.org"));
  const { signal } = new AbortController();
  const text: AnswerRecord = await endpoint.analyzeText("?", { maxNewTokens: 4, seed: 1, stop: ["\n"] }, { signal });
  await endpoint.analyzeImageUrl("https://example.org/ecg.jpg", "?", { deepseekTimeout: 20 }, { timeoutMs: 5 });
  for (const image of [file, bytes, bytes.buffer as ArrayBuffer, "data:image/png;base64,AAAA"]) {
    await endpoint.analyzeImageBase64(image, text.generated_text);
  }
  const content = [{ type: "text" as const, text: "?" }, await imagePart(file)];
  await endpoint.chat([{ role: "user", content }]);
  const records: AnswerRecord[] = await endpoint.analyzeBatch(["?", { query: "?", image: file }, { messages: [] }]);
  for await (const event of endpoint.stream({ query: "?", image: file }, {}, { signal })) shown(event);
  if (records.length > MAX_IMAGE_BYTES) throw new Error(text.error);
}

function shown(event: StreamEvent): string {
  switch (event.type) {
    case "start":
      return event.id + event.model;
    case "text":
      return event.text;
    case "answer":
    case "record":
      return event.record.comment_text ?? event.record.generated_text;
  }
}

export function explained(error: unknown): string {
  if (!(error instanceof PULSEError)) return "";
  const status: number | undefined = error.status;
  return `${error.kind} ${status} ${error.text} ${error.records[0]?.error} ${error.requestId}`;
}

export async function refused(endpoint: PULSEEndpoint): Promise<void> {
  // @ts-expect-error the wire's names are not the client's
  await endpoint.analyzeText("?", { max_new_tokens: 4 });
  // @ts-expect-error a number
  await endpoint.analyzeText("?", { seed: "1" });
  // @ts-expect-error a question is due
  await endpoint.analyzeImageUrl("https://example.org/ecg.jpg");
  // @ts-expect-error no image
  await endpoint.analyzeImageBase64(5, "?");
  // @ts-expect-error the tool's role is not known
  await endpoint.chat([{ role: "tool", content: "?" }]);
  // @ts-expect-error text belongs to the text event alone
  for await (const event of endpoint.stream("?")) event.text;
}
