// OpenAI's client for Node: chats, streams, a round of tools, completions, errors. Argument: the server's URL.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const [{ id: model }] = (await client.models.list()).data;
const hello = [{ role: "user", content: "hello" }];
const question = [{ role: "user", content: "What is the weather in Oslo?" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const getWeather = { name: "get_weather", description: "Get the weather of a city", parameters };
const tools = [{ type: "function", function: getWeather }];
const weather = '{"temperature": 21, "sky": "sunny"}';

const answer = await client.chat.completions.create({ model, messages: hello, temperature: 0 });
const said = answer.choices[0].message;
assert.match(said.content, /^Hello! /);
assert.equal(said.reasoning_content, "A greeting.");

let streamed = "";
let usage = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ model, messages: hello, temperature: 0, ...options })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, said.content);
assert.equal(usage.completion_tokens, answer.usage.completion_tokens);

const asked = await client.chat.completions.create({ model, messages: question, tools, temperature: 0 });
assert.equal(asked.choices[0].finish_reason, "tool_calls");
const [call] = asked.choices[0].message.tool_calls;
assert.deepEqual([call.function.name, JSON.parse(call.function.arguments)], ["get_weather", { city: "Oslo" }]);
const result = { role: "tool", tool_call_id: call.id, content: weather };
const told = await client.chat.completions.create({
  model, tools, temperature: 0, messages: [...question, asked.choices[0].message, result],
});
assert.match(told.choices[0].message.content, /21.*sunny/);

// The helper that runs the tools itself, over streams.
const cities = [];
const run = (argument) => { cities.push(argument.city); return weather; };
const runnable = { type: "function", function: { ...getWeather, parse: JSON.parse, function: run } };
const runner = client.chat.completions.runTools({
  model, messages: question, tools: [runnable], temperature: 0, stream: true,
});
assert.match(await runner.finalContent(), /21.*sunny/);
assert.deepEqual(cities, ["Oslo"]);

const text = await client.completions.create({ model, prompt: "hello", max_tokens: 3, echo: true, logprobs: 1 });
assert.match(text.choices[0].text, /^hello/);

await assert.rejects(client.chat.completions.create({ model: "gpt-5", messages: hello }), OpenAI.NotFoundError);
await assert.rejects(
  client.chat.completions.create({ model, messages: hello, temperature: -1 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);
