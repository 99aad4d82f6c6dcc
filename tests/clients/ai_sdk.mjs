// The Vercel AI SDK by way of @ai-sdk/openai-compatible: text, streams, reasoning, tools. Argument: the server's URL.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2] + "/v1";
const [{ id }] = (await (await fetch(baseURL + "/models")).json()).data;
const model = createOpenAICompatible({ name: "nanoserve", baseURL, includeUsage: true, supportsStructuredOutputs: true })(id);
const plain = { model, temperature: 0, maxRetries: 0 };
const cities = [];
const tools = {
  get_weather: tool({
    description: "Get the weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => { cities.push(city); return { temperature: 21, sky: "sunny" }; },
  }),
};
const agent = { ...plain, tools, stopWhen: stepCountIs(3), prompt: "What is the weather in Oslo?" };

const answer = await generateText({ ...plain, prompt: "hello" });
assert.match(answer.text, /^Hello! /);
assert.equal(answer.reasoningText, "A greeting.");
assert.ok(answer.usage.inputTokens > 0 && answer.usage.outputTokens > 0);

const stream = streamText({ ...plain, prompt: "hello" });
const pieces = [];
for await (const piece of stream.textStream) pieces.push(piece);
assert.ok(pieces.length > 1);
assert.equal(pieces.join(""), answer.text);
assert.equal(await stream.reasoningText, "A greeting.");
assert.equal((await stream.usage).outputTokens, answer.usage.outputTokens);

// An object that its schema holds to; the answer's reasoning stays apart.
const schema = z.object({ name: z.string(), age: z.number().int(), city: z.string() });
const kinds = { name: { type: "string" }, age: { type: "integer" }, city: { type: "string" } };
const ask = JSON.stringify({ type: "object", properties: kinds, required: Object.keys(kinds) });
const prompt = `This is about Anna. Anna is 31 years old. Anna lives in Oslo.\n\nAnswer as JSON for this schema: ${ask}`;
const person = await generateText({ ...plain, prompt, output: Output.object({ schema }) });
assert.deepEqual(person.output, { name: "Anna", age: 31, city: "Oslo" });

const done = await generateText(agent);
assert.match(done.text, /21.*sunny/);
assert.equal(done.steps.length, 2);
const streamed = streamText(agent);
assert.match(await streamed.text, /21.*sunny/);
assert.deepEqual(cities, ["Oslo", "Oslo"]);

await assert.rejects(generateText({ ...plain, temperature: -1, prompt: "hello" }), (error) => error.statusCode === 400);
