// One tool loop of the AI SDK: node - ROUTE BASE_URL MODEL PROMPT, with the packages of the working directory.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [route, url, name, prompt] = process.argv.slice(2);
const settings = { baseURL: `${url}/v1`, apiKey: "none" };
const model = {
  responses: () => createOpenAI(settings)(name),
  chat: () => createOpenAI(settings).chat(name),
  compatible: () => createOpenAICompatible({ ...settings, name: "qwen3" })(name),
  anthropic: () => createAnthropic(settings)(name),
}[route]();
const read_file = tool({
  description: "Reads a file.",
  inputSchema: z.object({ path: z.string() }),
  execute: async ({ path }) => `${path} holds the word pelican-4711`,
});
const asked = { model, prompt, tools: { read_file }, stopWhen: stepCountIs(4), maxRetries: 0 };
const whole = await generateText(asked);
const stream = streamText({ ...asked, onError: ({ error }) => { throw error; } });
let text = "";
for await (const part of stream.textStream) text += part;
const told = (steps) => steps.map((step) => step.toolCalls.map((call) => call.toolName));
console.log(JSON.stringify({
  whole: { text: whole.text, calls: told(whole.steps), finish: whole.finishReason },
  streamed: { text, calls: told(await stream.steps), finish: await stream.finishReason },
}));
