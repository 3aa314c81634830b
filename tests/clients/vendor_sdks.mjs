// The vendors' own tool runners: node - API BASE_URL MODEL PROMPT, with the packages of the working directory.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [api, url, model, content] = process.argv.slice(2);
const name = "read_file";
const description = "Reads a file.";
const schema = { type: "object", properties: { path: { type: "string" } }, required: ["path"] };
const run = ({ path }) => `${path} holds the word pelican-4711`;
const messages = [{ role: "user", content }];

async function openai() {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const fn = { name, description, parameters: schema, parse: JSON.parse, function: run };
  const tools = [{ type: "function", function: fn }];
  const told = [];
  for (const stream of [false, true]) {
    told.push(await client.chat.completions.runTools({ model, messages, tools, stream }).finalContent());
  }
  return { told, models: (await client.models.list()).data.map((one) => one.id) };
}

async function anthropic() {
  const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
  const tools = [{ name, description, input_schema: schema, run }];
  const asked = { model, max_tokens: 200, messages, tools };
  const text = (message) => message.content.map((block) => block.text ?? "").join("");
  const told = [text(await client.beta.messages.toolRunner(asked))];
  for await (const stream of client.beta.messages.toolRunner({ ...asked, stream: true })) {
    told[1] = text(await stream.finalMessage());
  }
  return { told, models: (await client.models.list()).data.map((one) => one.display_name) };
}

console.log(JSON.stringify(await { openai, anthropic }[api]()));
