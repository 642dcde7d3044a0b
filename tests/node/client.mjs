// The official Node client against a server: node client.mjs BASE_URL MODEL
// Prints what came back as one JSON document; test_node_client.py judges it.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Say héllo 👋" }];
const common = { model, max_tokens: 12, seed: 7, ignore_eos: true };

const models = [];
for await (const entry of client.models.list()) models.push(entry.id);

const chat = await client.chat.completions.create({ ...common, messages });

const streamed = { text: "", roles: [], finish: null, usage: null };
const stream = await client.chat.completions.create({
  ...common,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  if (chunk.usage) streamed.usage = chunk.usage;
  for (const choice of chunk.choices) {
    streamed.text += choice.delta.content ?? "";
    if (choice.delta.role) streamed.roles.push(choice.delta.role);
    streamed.finish = choice.finish_reason ?? streamed.finish;
  }
}

const completion = await client.completions.create({ ...common, prompt: ["one", "two"], n: 2 });

const errors = {};
for (const [name, request] of Object.entries({
  unknownModel: { ...common, model: "no-such-model", messages },
  badTemperature: { ...common, messages, temperature: -1 },
})) {
  try {
    await client.chat.completions.create(request);
    errors[name] = null;
  } catch (error) {
    errors[name] = { status: error.status, code: error.code, param: error.param };
  }
}

// A stream that is left early: the server must notice.
const left = await client.chat.completions.create({
  ...common,
  messages,
  max_tokens: 200,
  stream: true,
});
for await (const _ of left) break;

console.log(
  JSON.stringify({
    models,
    chat: { text: chat.choices[0].message.content, usage: chat.usage, finish: chat.choices[0].finish_reason },
    streamed,
    completions: completion.choices.map((choice) => choice.text),
    errors,
  }),
);
