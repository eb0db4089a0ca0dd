// Asks our own server through OpenAI's package: whole, in chunks, with the commentary, with an error, and hanging up.
// Usage: node talk.mjs BASE_URL IMAGE_DATA_URI; prints one JSON object.
import OpenAI from "openai";

const [baseURL, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const question = {
  model: "PULSE-7B",
  temperature: 0,
  max_tokens: 12,
  messages: [
    {
      role: "user",
      content: [
        { type: "text", text: "What is the rate?" },
        { type: "image_url", image_url: { url: image } },
      ],
    },
  ],
};

const whole = await client.chat.completions.create({ ...question, turkish_commentary: true });

let text = "";
let usage = null;
let finish = null;
const stream = await client.chat.completions.create({
  ...question,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}

let error = null;
try {
  await client.chat.completions.create({ ...question, temperature: 9 });
} catch (caught) {
  error = { status: caught.status, param: caught.param, type: caught.type, name: caught.constructor.name };
}

const left = await client.chat.completions.create({ ...question, max_tokens: 2000, stop: ["zzzzzz"], stream: true });
for await (const chunk of left) {
  if (chunk.choices[0]?.delta.content) break; // closes the connection
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    commentary: whole.turkish_commentary.commentary_status,
    text,
    finish,
    usage,
    whole_usage: whole.usage,
    error,
    models,
  }),
);
