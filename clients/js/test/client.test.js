import assert from "node:assert/strict";
import { test } from "node:test";

import { imagePart, MAX_IMAGE_BYTES, PULSEEndpoint, PULSEError } from "../pulse-ecg-client.js";
import {
  collected,
  COMMENTED,
  cut,
  dripping,
  dropped,
  ERROR_RECORD,
  event,
  EVENTS,
  raw,
  RECORD,
  refusal,
  reply,
  silent,
  standIn,
  STREAM,
  streamed,
  TOKEN,
  withoutWaiting,
} from "./stand-in.js";

const PNG = new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 1, 2, 3]);
const PNG_URI = `data:image/png;base64,${Buffer.from(PNG).toString("base64")}`;
const SHARED = { do_sample: true, enable_turkish_commentary: true };
const IMAGE_DEFAULTS = { ...SHARED, max_new_tokens: 512, temperature: 0.2, top_p: 0.9, repetition_penalty: 1.05 };
const EVERYTHING = {
  maxNewTokens: 4,
  temperature: 1,
  topP: 0.5,
  topK: 3,
  doSample: false,
  repetitionPenalty: 1.2,
  stop: ["\n"],
  returnFullText: true,
  enableTurkishCommentary: false,
  deepseekTimeout: 20,
  seed: 7,
  details: true,
};

/** A test with a host of its own and an endpoint on it. */
function hosted(name, act) {
  test(name, async () => {
    const host = await standIn();
    try {
      await act(host, new PULSEEndpoint(host.url, TOKEN));
    } finally {
      await host.close();
    }
  });
}

async function failure(promise) {
  const error = await promise.then(
    () => assert.fail("the call did not fail"),
    (reason) => reason,
  );
  assert.ok(error instanceof PULSEError, error);
  return error;
}

// --- what is sent

hosted("a question is sent as callers know", async (host, endpoint) => {
  assert.deepEqual(await endpoint.analyzeText("Ne demek?"), RECORD);
  const [{ headers, body }] = host.requests;
  const parameters = { ...SHARED, max_new_tokens: 256, temperature: 0.7, top_p: 0.95 };
  assert.deepEqual(body, { inputs: "Ne demek?", parameters });
  assert.equal(headers["content-type"], "application/json");
  assert.equal(headers.accept, "application/json");
  assert.equal(headers.authorization, `Bearer ${TOKEN}`);
});

hosted("a parameter that is undefined is one that is not given", async (host, endpoint) => {
  await endpoint.analyzeText("?", { maxNewTokens: undefined, topP: undefined, seed: 1 });
  await endpoint.analyzeText("?", { seed: 1 });
  const [undefinedOnes, without] = host.bodies();
  assert.deepEqual(undefinedOnes, without);
});

hosted("an image is sent as callers know", async (host, endpoint) => {
  await endpoint.analyzeImageUrl("https://example.org/ecg.jpg", "Rhythm?");
  await endpoint.analyzeImageBase64(new Blob([PNG]), "Rate?", { maxNewTokens: 64, deepseekTimeout: 20 });
  const [byUrl, byFile] = host.bodies();
  assert.deepEqual(byUrl.inputs, { query: "Rhythm?", image: "https://example.org/ecg.jpg" });
  assert.deepEqual(byUrl.parameters, { ...IMAGE_DEFAULTS, deepseek_timeout: 30 });
  assert.deepEqual(byFile.inputs, { query: "Rate?", image: PNG_URI });
  assert.deepEqual(byFile.parameters, { ...IMAGE_DEFAULTS, max_new_tokens: 64, deepseek_timeout: 20 });
});

hosted("every parameter has its name on the wire, and no other name is accepted", async (host, endpoint) => {
  await endpoint.analyzeText("?", EVERYTHING);
  await endpoint.chat([{ role: "user", content: "?" }], { seed: undefined });
  const [everything, chat] = host.bodies();
  const snake = (name) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
  const due = Object.fromEntries(Object.entries(EVERYTHING).map(([name, value]) => [snake(name), value]));
  assert.deepEqual(everything.parameters, due);
  assert.deepEqual(chat, { inputs: { messages: [{ role: "user", content: "?" }] } });
  for (const wrong of ["max_new_tokens", "constructor"]) {
    await assert.rejects(endpoint.analyzeText("?", { [wrong]: 4 }), TypeError);
    assert.throws(() => endpoint.stream("?", { [wrong]: 4 }), /known: maxNewTokens/);
  }
  assert.equal(host.requests.length, 2);
});

hosted("a batch has one record for each input", async (host, endpoint) => {
  host.script = [reply(RECORD, ERROR_RECORD), reply(RECORD)];
  const inputs = ["?", { query: "?", image: PNG }];
  assert.deepEqual(await endpoint.analyzeBatch(inputs, { seed: 1 }), [RECORD, ERROR_RECORD]);
  assert.deepEqual(host.bodies()[0], { inputs: ["?", { query: "?", image: PNG_URI }], parameters: { seed: 1 } });
  const error = await failure(endpoint.analyzeBatch(inputs));
  assert.match(error.message, /1 records instead of 2/);
  host.script = [reply(ERROR_RECORD)]; // the stock container refuses the whole batch
  const refused = await failure(endpoint.analyzeBatch(inputs));
  const { kind, status, message, records } = refused;
  assert.deepEqual([kind, status, message, records], ["status", 200, ERROR_RECORD.error, [ERROR_RECORD]]);
  await assert.rejects(endpoint.analyzeBatch("What is the rhythm?"), /a list of inputs/);
  assert.equal(host.requests.length, 3);
});

test("images of every kind are sent", async () => {
  const around = new Uint8Array([0, ...PNG, 0]);
  const view = around.subarray(1, -1); // its buffer holds more than the image
  for (const image of [PNG, Buffer.from(PNG), PNG.buffer, new DataView(PNG.buffer), view, new Blob([PNG])]) {
    assert.deepEqual(await imagePart(image), { type: "image_url", image_url: { url: PNG_URI } });
  }
  for (const text of ["https://example.org/a?b=c", "HTTP://example.org", PNG_URI]) {
    assert.equal((await imagePart(text)).image_url.url, text);
  }
  const bytes = Uint8Array.from({ length: 100_001 }, (_, at) => (at * 7919) % 256);
  const [, data] = (await imagePart(bytes)).image_url.url.split(",");
  assert.deepEqual(new Uint8Array(Buffer.from(data, "base64")), bytes);
  await imagePart(new Uint8Array(MAX_IMAGE_BYTES));
});

hosted("an image that cannot be sent is refused here", async (host, endpoint) => {
  const huge = new Uint8Array(MAX_IMAGE_BYTES + 1);
  const uri = `data:image/png;base64,${"A".repeat((MAX_IMAGE_BYTES * 4) / 3 + 8)}`;
  const unread = { [Symbol.toStringTag]: "File", size: MAX_IMAGE_BYTES + 1, arrayBuffer: () => assert.fail("read") };
  for (const image of [new Uint8Array(), new Blob([]), huge, unread, uri, "/9j/AAAA", 5, null, undefined, {}]) {
    const error = await failure(endpoint.analyzeImageBase64(image, "?"));
    assert.equal(error.kind, "image");
    assert.ok(error.message.length < 200 && !error.message.includes("AAAA"));
  }
  const moved = new DOMException("gone", "NotReadableError"); // the file was changed after it was chosen
  const file = { [Symbol.toStringTag]: "File", size: 5, arrayBuffer: () => Promise.reject(moved) };
  const error = await failure(endpoint.analyzeImageBase64(file, "?"));
  assert.deepEqual([error instanceof PULSEError, error.kind, error.cause], [true, "image", moved]);
  assert.equal(host.requests.length, 0);
});

// --- what comes back

hosted("an error record with status 200 is returned", async (host, endpoint) => {
  host.script = [reply(ERROR_RECORD)];
  assert.deepEqual(await endpoint.analyzeText("?"), ERROR_RECORD);
});

for (const status of [400, 401, 403, 404, 413, 422, 429, 500, 502, 503, 504]) {
  hosted(`status ${status} rejects with status and text`, async (host, endpoint) => {
    host.script = [refusal(status, { "X-Request-Id": "r-1", "Retry-After": "3600" })];
    const error = await failure(endpoint.analyzeText("?"));
    assert.equal(error.message, `HTTP ${status}: No.`);
    const { kind, records, requestId, text } = error;
    assert.deepEqual([kind, error.status, records, requestId], ["status", status, [ERROR_RECORD], "r-1"]);
    assert.deepEqual(JSON.parse(text), [ERROR_RECORD]);
    assert.equal(host.requests.length, 1);
  });
}

hosted("the stock container's refusal, and a page in place of JSON, are told in short", async (host, endpoint) => {
  host.script = [raw(400, '{"error": "Body needs to provide a inputs key."}'), raw(404, `<html>\n${"x".repeat(9999)}`)];
  assert.equal((await failure(endpoint.analyzeText("?"))).message, "HTTP 400: Body needs to provide a inputs key.");
  const error = await failure(endpoint.analyzeText("?"));
  assert.ok(error.message.length < 600 && error.text.length > 9999);
});

for (const body of ["", "<html>", "{}", "[]", '["text"]', "[null]", '{"error": "x"}', "[{}, {}]"]) {
  hosted(`a reply of another kind is an error: ${body}`, async (host, endpoint) => {
    host.script = [raw(200, body)];
    const { kind, status, text } = await failure(endpoint.analyzeText("?"));
    assert.deepEqual([kind, status, text], ["reply", 200, body]);
  });
}

// --- again, or not

for (const status of [429, 502, 503]) {
  hosted(`an endpoint that answers ${status} is asked again`, async (host) => {
    const soon = new Date(Date.now() + 30_000).toUTCString();
    host.script = [refusal(status), refusal(status, { "Retry-After": "7" }), refusal(status, { "Retry-After": soon })];
    host.script.push(refusal(status, { "Retry-After": "soon" }), reply());
    const told = [];
    const endpoint = new PULSEEndpoint(host.url, TOKEN, { onRetry: (retry) => told.push(retry) });
    const waits = await withoutWaiting(async () => assert.deepEqual(await endpoint.analyzeText("?"), RECORD));
    const bounds = [
      [250, 500],
      [7000, 8750],
      [25_000, 37_500],
      [2000, 4000],
    ];
    assert.deepEqual(
      told.map((retry) => [retry.attempt, retry.error.status]),
      bounds.map((_, at) => [at + 1, status]),
    );
    bounds.forEach(([least, most], at) => {
      const { delayMs } = told[at];
      assert.ok(delayMs >= least && delayMs <= most && waits.includes(delayMs), `wait ${at}: ${delayMs} ms`);
    });
    assert.ok(told.every((retry) => retry.leftMs > 500_000 && retry.leftMs <= 600_000));
    assert.equal(new Set(host.bodies().map((body) => JSON.stringify(body))).size, 1);
  });
}

for (const status of [400, 401, 404, 413, 422, 500, 504]) {
  hosted(`status ${status} is final`, async (host, endpoint) => {
    host.script = [refusal(status, { "Retry-After": "0" }), reply()];
    await failure(endpoint.analyzeText("?"));
    assert.equal(host.requests.length, 1);
  });
}

for (const behaviour of [dropped, cut]) {
  hosted(`a reply that is ${behaviour.name} is final`, async (host, endpoint) => {
    host.script = [behaviour, reply()];
    const error = await failure(endpoint.analyzeText("?"));
    assert.equal(error.kind, "connection");
    assert.ok(error.cause instanceof Error);
    assert.equal(host.requests.length, 1);
  });
}

test("a host that is not there is tried a few times", async () => {
  const host = await standIn();
  await host.close();
  const attempts = [];
  const endpoint = new PULSEEndpoint(host.url, TOKEN, { onRetry: ({ attempt }) => attempts.push(attempt) });
  await withoutWaiting(async () => {
    const error = await failure(endpoint.analyzeText("?"));
    assert.equal(error.kind, "connection");
    assert.match(error.message, /127\.0\.0\.1.*ECONNREFUSED/);
  });
  assert.deepEqual(attempts, [1, 2, 3]);
});

test("of several addresses none of which connects counts as one that does not, and a break later is final", async () => {
  const one = (code, syscall) => Object.assign(new Error(code), { code, syscall });
  for (const [errors, tries] of [
    [[one("ETIMEDOUT", "connect"), one("ENETUNREACH", "connect")], 4],
    [[one("ETIMEDOUT", "read"), one("ENETUNREACH", "connect")], 1],
    [[], 1],
  ]) {
    let count = 0;
    const fetch = () => {
      count += 1;
      const cause = Object.assign(new AggregateError(errors), { code: "ETIMEDOUT" });
      return Promise.reject(Object.assign(new TypeError("fetch failed"), { cause }));
    };
    await withoutWaiting(async () => {
      const error = await failure(new PULSEEndpoint("https://example.org", TOKEN, { fetch }).analyzeText("?"));
      assert.equal(error.kind, "connection");
    });
    assert.equal(count, tries);
  }
});

test("a waking host that is gone for a moment is asked on, one that stays away is not", async () => {
  const gone = () => Promise.reject(Object.assign(new TypeError("fetch failed"), { cause: { code: "ECONNREFUSED" } }));
  const said = (status) => Promise.resolve(new Response(JSON.stringify([status === 200 ? RECORD : ERROR_RECORD]), { status }));
  const outcomes = [503, 503, 503, 503, 0, 0, 0, 503, 0, 200, 503, 503, 503, 503, 503, 0, 0, 0, 0];
  const endpoint = new PULSEEndpoint("https://example.org", TOKEN, {
    fetch: () => {
      const status = outcomes.shift();
      return status ? said(status) : gone();
    },
  });
  await withoutWaiting(async () => {
    assert.deepEqual(await endpoint.analyzeText("?"), RECORD);
    assert.equal((await failure(endpoint.analyzeText("?"))).kind, "connection");
  });
  assert.equal(outcomes.length, 0);
});

hosted("no wait begins that the deadline would cut short", async (host, endpoint) => {
  host.script = [refusal(503, { "Retry-After": "20" })];
  const error = await failure(endpoint.analyzeText("?", {}, { timeoutMs: 19_000 }));
  assert.deepEqual([error.status, host.requests.length], [503, 1]);
});

for (const behaviour of [silent, dripping]) {
  hosted(`the deadline holds for a host that is ${behaviour.name}`, async (host, endpoint) => {
    host.script = [behaviour];
    const error = await failure(endpoint.analyzeText("?", {}, { timeoutMs: 200 }));
    assert.equal(error.kind, "timeout");
    assert.match(error.message, /within 0.2 seconds/);
  });
}

test("the deadline holds for a fetch that knows no signal", async () => {
  const endpoint = new PULSEEndpoint("https://example.org", TOKEN, { fetch: () => new Promise(() => {}), timeoutMs: 50 });
  assert.equal((await failure(endpoint.analyzeText("?"))).kind, "timeout");
});

test("a time-out is a number of milliseconds", async () => {
  for (const timeoutMs of [0, -1, NaN, Infinity, 2 ** 31, "soon"]) {
    assert.throws(() => new PULSEEndpoint("https://example.org", TOKEN, { timeoutMs }), RangeError);
    const endpoint = new PULSEEndpoint("https://example.org", TOKEN);
    await assert.rejects(endpoint.analyzeText("?", {}, { timeoutMs }), RangeError);
  }
});

hosted("the caller's signal ends a call wherever it stands", async (host, endpoint) => {
  const reason = new Error("enough");
  const aborting = (behaviour) => {
    const controller = new AbortController();
    host.script = [
      (response, request) => {
        behaviour(response, request);
        setTimeout(() => controller.abort(reason), 20);
      },
    ];
    return { signal: controller.signal };
  };
  for (const behaviour of [silent, dripping, refusal(503, { "Retry-After": "30" })]) {
    await assert.rejects(endpoint.analyzeText("?", {}, aborting(behaviour)), (error) => error === reason);
  }
  const stream = endpoint.stream("?", {}, aborting(streamed(STREAM.slice(0, 3), () => new Promise(() => {}))));
  await assert.rejects(collected(stream), (error) => error === reason);
  const before = host.requests.length;
  await assert.rejects(endpoint.analyzeText("?", {}, { signal: AbortSignal.abort(reason) }), (error) => error === reason);
  assert.equal(host.requests.length, before);
});

// --- secrets, and hosts that nobody named

test("the token is shown nowhere, not by a host that answers with the request's headers either", async () => {
  const echo = (status) => (response, request) => raw(status, JSON.stringify(request.headers))(response);
  const host = await standIn(echo(503), echo(400), echo(200), dropped);
  try {
    const endpoint = new PULSEEndpoint(`${host.url}?key=secret`, `${TOKEN}\n`);
    const shown = [JSON.stringify(endpoint), JSON.stringify({ ...endpoint }), String(endpoint)];
    await withoutWaiting(async () => {
      for (let count = 0; count < 3; count += 1) {
        const error = await failure(endpoint.analyzeText("?"));
        shown.push(error.stack, error.message, error.text, String(error.cause?.stack));
      }
    });
    assert.ok(!shown.join().includes(TOKEN) && !shown.join().includes("secret"));
    assert.ok(shown.join().includes("***"));
    assert.ok(host.requests.every(({ headers }) => headers.authorization === `Bearer ${TOKEN}`));
  } finally {
    await host.close();
  }
});

test("a token or URL that cannot be one is refused unseen", () => {
  for (const token of ["hf_a\nb", "hf_a b", "hf_ä", "hf_\0"]) {
    assert.throws(() => new PULSEEndpoint("https://example.org", token), (error) => !error.message.includes("hf_"));
  }
  for (const url of ["", "example.org", "/path", "ftp://example.org", "https://", "https://u:pw1@example.org", undefined]) {
    assert.throws(() => new PULSEEndpoint(url, TOKEN), (error) => /URL/.test(error.message) && !/pw1/.test(error.message));
  }
});

test("on a page, a path names its own host, and a host without a scheme is no path", async () => {
  const asked = [];
  const fetch = (url) => {
    asked.push(url);
    return Promise.resolve(new Response(JSON.stringify([RECORD]), { status: 200 }));
  };
  globalThis.location = { href: "https://page.example.org/app/" };
  try {
    for (const url of ["", "xyz.endpoints.huggingface.cloud", undefined, "localhost:8080"]) {
      assert.throws(() => new PULSEEndpoint(url, TOKEN, { fetch }), /URL/, String(url));
    }
    for (const url of ["/pulse", "./pulse", "../pulse"]) await new PULSEEndpoint(url, TOKEN, { fetch }).analyzeText("?");
  } finally {
    delete globalThis.location;
  }
  assert.deepEqual(asked, ["pulse", "app/pulse", "pulse"].map((path) => `https://page.example.org/${path}`));
});

hosted("without a token none is sent", async (host) => {
  for (const token of [undefined, null, "", " \n"]) await new PULSEEndpoint(host.url, token).analyzeText("?");
  assert.ok(host.requests.every(({ headers }) => headers.authorization === undefined));
});

for (const status of [301, 302, 303, 307, 308]) {
  hosted(`redirect ${status} is not followed`, async (host, endpoint) => {
    const other = await standIn();
    host.script = [raw(status, "", { Location: `${other.url}/page` })];
    const error = await failure(endpoint.analyzeText("?"));
    assert.deepEqual([error.kind, error.status, other.requests.length], ["status", status, 0]);
    assert.match(error.message, /redirects are not followed/);
    await other.close();
  });
}

// --- streams

hosted("a stream comes event by event", async (host, endpoint) => {
  let seen;
  const waiting = new Promise((resolve) => (seen = resolve));
  const rest = STREAM.slice(3);
  host.script = [streamed(STREAM.slice(0, 3), (response) => waiting.then(() => rest.map((piece) => response.write(piece))))];
  const stream = endpoint.stream({ query: "?", image: PNG }, { seed: 1 });
  const events = [(await stream.next()).value, (await stream.next()).value];
  assert.deepEqual(events, EVENTS.slice(0, 2));
  seen();
  assert.deepEqual([...events, ...(await collected(stream))], EVENTS);
  const [{ body, headers }] = host.requests;
  assert.deepEqual(body, { inputs: { query: "?", image: PNG_URI }, parameters: { seed: 1 }, stream: true });
  assert.equal(headers.accept, "application/json");
});

test("the cuts between a stream's pieces do not matter", async () => {
  for (const lineEnd of ["\n", "\r\n", "\r"]) {
    const bytes = new TextEncoder().encode(STREAM.join("").replaceAll("\n", lineEnd));
    for (const size of [1, 2, 3, 5, 64, bytes.length]) {
      const pieces = [];
      for (let at = 0; at < bytes.length; at += size) pieces.push(bytes.slice(at, at + size));
      const source = new ReadableStream({
        start(controller) {
          for (const piece of pieces) controller.enqueue(piece);
          controller.close();
        },
      });
      const fetch = async () => new Response(source, { headers: { "Content-Type": "text/event-stream" } });
      const endpoint = new PULSEEndpoint("https://example.org", TOKEN, { fetch });
      assert.deepEqual(await collected(endpoint.stream("?")), EVENTS, `${JSON.stringify(lineEnd)} ${size}`);
    }
  }
});

hosted("an error in the stream rejects with its status", async (host, endpoint) => {
  host.script = [streamed([...STREAM.slice(0, 3), event("error", { ...ERROR_RECORD, status: 504 })])];
  const stream = endpoint.stream("?");
  await stream.next();
  await stream.next();
  const error = await failure(stream.next());
  assert.deepEqual([error.message, error.status, error.records], ["HTTP 504: No.", 504, [ERROR_RECORD]]);
  assert.equal(error.requestId, "r-2");
});

hosted("a stream waits for a sleeping endpoint but never begins twice", async (host, endpoint) => {
  const cutShort = (response) => response.write(": the end\n", () => response.socket.destroy()) && false;
  host.script = [refusal(503), streamed(STREAM.slice(0, 3), cutShort), reply()];
  const error = await failure(collected(endpoint.stream("?")));
  assert.equal(error.kind, "connection");
  assert.equal(host.requests.length, 2);
});

for (let count = 0; count < STREAM.length; count += 1) {
  hosted(`a stream that ends after ${count} of its pieces is an error`, async (host, endpoint) => {
    host.script = [streamed(STREAM.slice(0, count))];
    const error = await failure(collected(endpoint.stream("?")));
    assert.deepEqual([error.kind, error.status], ["reply", 200]);
  });
}

for (const broken of ["event: text\ndata: {\n\n", event("text", {}), event("start", []), event("error", 1)]) {
  hosted(`a malformed event is an error: ${JSON.stringify(broken)}`, async (host, endpoint) => {
    host.script = [streamed([broken])];
    assert.match((await failure(collected(endpoint.stream("?")))).message, /malformed/);
  });
}

hosted("the deadline holds within a stream", async (host, endpoint) => {
  host.script = [streamed(STREAM.slice(0, 3), () => new Promise(() => {}))];
  const error = await failure(collected(endpoint.stream("?", {}, { timeoutMs: 300 })));
  assert.equal(error.kind, "timeout");
});

hosted("leaving a stream ends the request", async (host, endpoint) => {
  let left;
  const gone = new Promise((resolve) => (left = resolve));
  host.script = [streamed(STREAM.slice(0, 3), (response) => response.on("close", left) && new Promise(() => {}))];
  for await (const _ of endpoint.stream("?")) break;
  await gone;
});

hosted("a host that cannot stream is asked for the whole", async (host, endpoint) => {
  const unknown = { ...ERROR_RECORD, error: "The body has the unknown key 'stream'." };
  host.script = [reply(unknown), reply(COMMENTED), reply(RECORD)];
  const whole = [
    { type: "start", id: "", model: "PULSE-7B" },
    { type: "text", text: "Sinus rhythm." },
    { type: "answer", record: RECORD },
  ];
  assert.deepEqual(await collected(endpoint.stream("?")), [...whole, { type: "record", record: COMMENTED }]);
  assert.deepEqual(await collected(endpoint.stream("?")), [...whole, { type: "record", record: RECORD }]);
  assert.deepEqual(
    host.bodies().map((body) => "stream" in body),
    [true, false, false],
  );
});

hosted("an error record in place of a stream rejects", async (host, endpoint) => {
  host.script = [reply(ERROR_RECORD)];
  const error = await failure(collected(endpoint.stream("?")));
  assert.deepEqual([error.message, error.status, error.records], ["No.", 200, [ERROR_RECORD]]);
});
