// The reference at /docs: the OpenAPI document as plain sections, drawn here so that nothing comes from elsewhere.

const element = (name, props = {}, ...children) => {
  const made = Object.assign(document.createElement(name), props);
  made.append(...children);
  return made;
};
const code = (text) => element("code", { textContent: text });

async function start() {
  const reply = await fetch("openapi.json");
  const api = await reply.json();
  document.getElementById("facts").textContent = `version ${api.info.version}`;
  const about = element("section", { className: "card" });
  for (const paragraph of api.info.description.split("\n\n")) about.append(element("p", { textContent: paragraph.replaceAll("`", "") }));
  const sections = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => section(api, method, path, operation)));
  document.getElementById("main").replaceChildren(about, ...sections);
}

function section(api, method, path, operation) {
  const details = element("details", { className: "card operation", id: operation.operationId });
  details.append(element("summary", {}, element("span", { className: "method", textContent: method.toUpperCase() }),
    code(path), element("span", { className: "about", textContent: firstLine(operation.description) })));
  const parameters = operation.parameters ?? [];
  if (parameters.length) details.append(heading("Parameters"), table(["name", "in", "meaning"],
    parameters.map((entry) => [code(entry.name), entry.in, entry.description ?? typeOf(api, entry.schema)])));
  for (const [type, content] of Object.entries(operation.requestBody?.content ?? {})) {
    details.append(heading(`Request, ${type}`), fields(api, content.schema));
    for (const example of resolve(api, content.schema).examples ?? []) details.append(block(JSON.stringify(shorten(example), null, 2)));
  }
  for (const [status, given] of Object.entries(operation.responses)) {
    const response = resolve(api, given);
    if (Number(status) >= 400) continue;
    for (const [type, content] of Object.entries(response.content ?? {})) details.append(heading(`${status}, ${type}`), fields(api, content.schema));
  }
  details.append(heading("Errors"), table(["status", "codes"], Object.entries(operation.responses)
    .filter(([status]) => Number(status) >= 400)
    .map(([status, given]) => [code(status), resolve(api, given).description.replace("Codes: ", "")])));
  return details;
}

const heading = (text) => element("h3", { textContent: text });
const block = (text) => element("pre", { textContent: text, tabIndex: 0 });
const firstLine = (text) => (text ?? "").split("\n")[0];

function table(heads, rows) {
  const head = element("tr", {}, ...heads.map((name) => element("th", { textContent: name, scope: "col" })));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

function resolve(api, schema) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.slice(2).split("/").reduce((place, name) => place[name], api);
}

function fields(api, schema) {
  const whole = resolve(api, schema);
  if (!whole.properties) return block(whole.description ?? whole.type ?? "");
  const required = new Set(whole.required ?? []);
  return table(["field", "type", "meaning"], Object.entries(whole.properties).map(([name, property]) => [
    code(required.has(name) ? `${name} *` : name), typeOf(api, property), meaning(property)]));
}

function meaning(property) {
  const fallback = property.default === undefined || property.default === null ? "" : ` Default: ${JSON.stringify(property.default)}.`;
  return (property.description ?? "") + fallback;
}

function typeOf(api, schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.anyOf) return [...new Set(schema.anyOf.map((entry) => typeOf(api, entry)))].join(" | ");
  if (schema.type === "array") return `[${typeOf(api, schema.items ?? {})}]`;
  if (schema.type === "object" && schema.properties) return `{${Object.keys(schema.properties).join(", ")}}`;
  return schema.type ?? "any";
}

function shorten(value) {
  if (typeof value === "string") return value.length > 60 ? `${value.slice(0, 40)}…` : value;
  if (Array.isArray(value)) return value.map(shorten);
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, shorten(entry)]));
  return value;
}

start();
