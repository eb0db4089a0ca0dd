// Server-sent events out of a response's body (EventSource cannot POST), as the HTML standard parses them.

/** Yields `{type, data}` for each event; `data` is text. */
export async function* serverSentEvents(body) {
  let event = { type: "message", data: [] };
  for await (const line of lines(body)) {
    if (line === "") {
      if (event.data.length) yield { type: event.type, data: event.data.join("\n") };
      event = { type: "message", data: [] };
    } else if (!line.startsWith(":")) {
      const [, field, value = ""] = line.match(/^([^:]*)(?:: ?(.*))?$/s);
      if (field === "event") event.type = value;
      if (field === "data") event.data.push(value);
    }
  }
}

/** Complete lines, ended by LF, CR LF or CR, wherever the network cut the bytes. */
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      // A CR at the very end may be half of a CR LF: it waits for what follows.
      const pieces = rest.split(/\r\n|\n|\r(?!$)/);
      rest = pieces.pop();
      yield* pieces;
    }
  } finally {
    await reader.cancel().catch(() => {}); // whoever stops listening early lets go of the connection
  }
}
