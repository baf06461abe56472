// The page at /: drop an image, type labels, see probabilities. Talks to this server only.

const $ = (id) => document.getElementById(id);
const DEBOUNCE_MS = 350;
const NEEDS_TOKEN = 401;

let image = null;
let running = null;

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function call(path, options = {}) {
  const reply = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  const body = await reply.json();
  if (reply.status === NEEDS_TOKEN) $("token-card").hidden = false;
  if (!reply.ok) throw new Error(body.error.message);
  return body;
}

function say(element, text, bad = false) {
  element.textContent = text;
  element.classList.toggle("bad", bad);
}

// Start

async function start() {
  try {
    const models = (await call("v1/models")).data;
    $("token-card").hidden = true;
    if (models.length === 0) {
      say($("message"), "The model is still loading…");
      setTimeout(start, 1000);
      return;
    }
    $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    $("model").disabled = models.length < 2;
    showFacts(models);
    $("model").onchange = () => { showFacts(models); classifySoon(); };
    say($("message"), "Choose an image to begin.");
    classifySoon();
    $("gallery-card").hidden = (await call("v1/gallery")).count === 0;
  } catch (error) {
    say($("message"), error.message, true);
  }
}

function showFacts(models) {
  const model = models.find((entry) => entry.id === $("model").value);
  $("facts").textContent = `${model.dimensions} dimensions · ${model.image_size.join("×")} px · ${model.dtype} on ${model.device}`;
  $("footer").textContent = `Fingerprint ${model.fingerprint} · ${model.engine}`;
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  start();
});

// The image

function useImage(file) {
  if (!file || !file.type.startsWith("image/")) return;
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  image = file;
  $("preview").src = URL.createObjectURL(file);
  $("preview").hidden = false;
  $("drop-hint").hidden = true;
  refresh();
  classify();
}

$("file").addEventListener("change", () => useImage($("file").files[0]));
addEventListener("paste", (event) => useImage([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") useImage(event.dataTransfer.files[0]);
  });
}

// Classification

function labels() {
  const entries = $("labels").value.split(/[\n,]/).map((label) => label.trim()).filter(Boolean);
  return [...new Set(entries)];
}

function refresh() {
  $("go").disabled = image === null || labels().length === 0;
}

let timer = 0;
function classifySoon() {
  refresh();
  clearTimeout(timer);
  timer = setTimeout(classify, DEBOUNCE_MS);
}

async function classify() {
  clearTimeout(timer);
  if ($("go").disabled || $("model").value === "") return;
  running?.abort();
  const own = (running = new AbortController());
  const form = new FormData();
  form.append("model", $("model").value);
  form.append("inputs", image);
  form.append("top_k", "20");
  form.append("multi_label", $("multi").checked);
  for (const label of labels()) form.append("labels", label);
  if ($("templates").value) form.append("templates", $("templates").value === "[]" ? "{}" : $("templates").value);
  say($("message"), "Classifying…");
  const began = performance.now();
  try {
    const reply = await call("v1/classify", { method: "POST", body: form, signal: own.signal });
    showResults(reply.data[0].predictions);
    say($("message"), `${Math.round(performance.now() - began)} ms`);
  } catch (error) {
    if (error.name !== "AbortError") say($("message"), error.message, true);
  }
}

function showResults(predictions) {
  const rows = predictions.map(({ label, probability }, index) => {
    const row = document.createElement("li");
    row.classList.toggle("best", index === 0);
    const name = Object.assign(document.createElement("span"), { className: "name", textContent: label });
    const percent = probability >= 0.0995 ? (100 * probability).toFixed(0) : (100 * probability).toFixed(1);
    const value = Object.assign(document.createElement("span"), { className: "value", textContent: `${percent} %` });
    const track = Object.assign(document.createElement("div"), { className: "track" });
    const fill = track.appendChild(document.createElement("div"));
    fill.style.width = `${100 * probability}%`;
    row.append(name, value, track);
    return row;
  });
  $("results").replaceChildren(...rows);
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); classify(); });
$("labels").addEventListener("input", classifySoon);
$("labels").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); classify(); }
});
for (const id of ["templates", "multi"]) $(id).addEventListener("change", classifySoon);

// Gallery

$("search").addEventListener("submit", async (event) => {
  event.preventDefault();
  say($("gallery-message"), "Searching…");
  const body = JSON.stringify({ text: $("query").value, model: $("model").value, top_k: 12 });
  try {
    const reply = await call("v1/gallery/search", {
      method: "POST", body, headers: { "Content-Type": "application/json" },
    });
    $("gallery").replaceChildren(...reply.data.map(picture));
    say($("gallery-message"), `The ${reply.data.length} nearest, nearest first.`);
  } catch (error) {
    say($("gallery-message"), error.message, true);
  }
});

function picture({ name, similarity, thumbnail }) {
  const item = document.createElement("li");
  const shown = Object.assign(document.createElement("img"), { src: thumbnail, alt: name });
  item.append(shown, `${name} · ${similarity.toFixed(3)}`);
  return item;
}

start();
