/** Client of a PULSE-7B endpoint, which reads ECG images. */

/** The most bytes that an image may have; checked before anything is sent. */
export const MAX_IMAGE_BYTES: number;

/** What is not given is left to the method's, else the endpoint's defaults. */
export interface Parameters {
  maxNewTokens?: number;
  temperature?: number;
  topP?: number;
  topK?: number;
  doSample?: boolean;
  repetitionPenalty?: number;
  stop?: string | string[];
  returnFullText?: boolean;
  enableTurkishCommentary?: boolean;
  /** Seconds, 10 to 60. */
  deepseekTimeout?: number;
  seed?: number;
  details?: boolean;
}

export interface CallOptions {
  /** Ends the call; it then fails with the signal's reason. */
  signal?: AbortSignal;
  /** Milliseconds for the whole call: waking, retries, the answer and its commentary. */
  timeoutMs?: number;
}

export interface EndpointOptions {
  /** As in {@link CallOptions}, for calls that do not say; 600,000 by default. */
  timeoutMs?: number;
  /** Told before each wait for another attempt. */
  onRetry?: (retry: Retry) => void;
  /** In place of the global one. */
  fetch?: typeof globalThis.fetch;
}

export interface Retry {
  /** What the attempt failed with. */
  error: PULSEError;
  /** Its number, from 1. */
  attempt: number;
  delayMs: number;
  /** Until the call's deadline. */
  leftMs: number;
}

/** A File, a Blob, bytes (in Node.js a Buffer), an http(s) URL or a data URI. */
export type Image = Blob | ArrayBuffer | ArrayBufferView | string;

export interface Question {
  query?: string;
  image?: Image;
}

export interface ContentPart {
  type: "text" | "image_url";
  text?: string;
  image_url?: { url: string };
}

export interface Message {
  role: "system" | "user" | "assistant";
  content: string | ContentPart[];
}

export interface Chat {
  messages: Message[];
}

export type Input = string | Question | Chat;

export type CommentaryStatus = "success" | "failed" | "unavailable" | "api_key_missing" | "no_text";

/** One answer. An error record has `error` and `success`; the commentary's fields come where it is on. */
export interface AnswerRecord {
  generated_text: string;
  model: string;
  processing_method?: string;
  comment_text?: string;
  commentary_model?: string;
  commentary_tokens?: number;
  commentary_status?: CommentaryStatus;
  commentary_error?: string;
  commentary_warnings?: { rule: string; severity: string; detail: string }[];
  details?: { [name: string]: unknown };
  error?: string;
  handler?: string;
  success?: boolean;
}

export type StreamEvent =
  /** The request is accepted and its image decoded; `id` is empty where the endpoint does not stream. */
  | { type: "start"; id: string; model: string }
  /** A piece of the answer, never empty. */
  | { type: "text"; text: string }
  /** The answer is complete; the commentary, if one is due, is not there yet. */
  | { type: "answer"; record: AnswerRecord }
  /** The whole record; the last event. */
  | { type: "record"; record: AnswerRecord };

export type ErrorKind =
  /** Another HTTP status than 200; from `stream`, an error record with status 200 too. */
  | "status"
  /** No connection, or one that broke. */
  | "connection"
  /** No whole reply within `timeoutMs`. */
  | "timeout"
  /** A reply that is no list of records, or a stream without its end. */
  | "reply"
  /** An image that cannot be sent. */
  | "image";

/** What a call fails with. No message, text or record of it is made from the token. */
export class PULSEError extends Error {
  readonly name: "PULSEError";
  readonly kind: ErrorKind;
  /** The HTTP status; undefined where no reply came. */
  readonly status: number | undefined;
  /** The reply's body. */
  readonly text: string;
  /** The records of the body, where it held any. */
  readonly records: AnswerRecord[];
  /** The server's name for the request in its logs. */
  readonly requestId: string | undefined;
}

/**
 * One endpoint, in the stock container or on the project's own server.
 *
 * Methods reject with a {@link PULSEError}, with the reason of the caller's signal, or with a TypeError for a parameter
 * that does not exist.
 */
export class PULSEEndpoint {
  /**
   * @param endpointUrl where requests are posted to; in a page, a path of its own host (`/pulse`, `./pulse`) will do
   * @param hfToken the bearer token; nothing for a server that wants none
   * @throws TypeError, RangeError: a URL, token or timeout that cannot be used; the message holds none of them
   */
  constructor(endpointUrl: string | URL, hfToken?: string | null, options?: EndpointOptions);

  /** The answer to a question without an image; maxNewTokens 256, temperature 0.7, topP 0.95. */
  analyzeText(text: string, parameters?: Parameters, options?: CallOptions): Promise<AnswerRecord>;

  /** The answer about an image that the endpoint fetches; maxNewTokens 512, temperature 0.2, topP 0.9. */
  analyzeImageUrl(
    imageUrl: string,
    query: string,
    parameters?: Parameters,
    options?: CallOptions,
  ): Promise<AnswerRecord>;

  /** The answer about an image of yours; defaults as for analyzeImageUrl. */
  analyzeImageBase64(
    imageFile: Image,
    query: string,
    parameters?: Parameters,
    options?: CallOptions,
  ): Promise<AnswerRecord>;

  /** The answer to a conversation in OpenAI's form. */
  chat(messages: Message[], parameters?: Parameters, options?: CallOptions): Promise<AnswerRecord>;

  /** One record for each input, in order; an input that fails has an error record. */
  analyzeBatch(inputs: Input[], parameters?: Parameters, options?: CallOptions): Promise<AnswerRecord[]>;

  /**
   * The answer as it is made. The stock container cannot stream: it is then asked again without streaming, and the
   * whole answer comes as one piece of text.
   */
  stream(input: Input, parameters?: Parameters, options?: CallOptions): AsyncGenerator<StreamEvent, void, undefined>;
}

/** The part of a chat message that shows an image. */
export function imagePart(image: Image): Promise<ContentPart>;
