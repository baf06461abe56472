// Text embeddings with OpenAI's own client:  npm install openai && node examples/serve_openai.mjs [URL]
import OpenAI from "openai";

const url = process.argv[2] ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.CLIPSTACK_TOKEN ?? "none" });
const [model] = (await client.models.list()).data;
const reply = await client.embeddings.create({ model: model.id, input: ["a red circle", "a blue square"] });
console.log(model.id, reply.data.length, "vectors of", reply.data[0].embedding.length, "dimensions");
