// Sends questions and shows their events as they arrive. External text only goes into text nodes.
"use strict";

const ACTIONS = { answer: "Answer", image_search: "Image search", text_search: "Text search" };
const ENDS = {
  turns: "The policy used all its turns without an answer.",
  tokens: "The policy reached the token limit without an answer.",
};
const LOST = "The connection was lost before the answer. Ask again.";
const PREVIEW = 320; // characters of a result that are shown at first

const form = document.getElementById("ask");
const field = document.getElementById("question");
const input = document.getElementById("image");
const drop = document.getElementById("drop");
const preview = document.getElementById("preview");
const send = document.getElementById("send");
const stop = document.getElementById("stop");

let image = null; // the chosen file
let running = null; // an AbortController while a question is being answered

function showProblem(text) {
  document.getElementById("problem").textContent = text;
}

// Make screen readers read a text.
function announce(text) {
  document.getElementById("live").textContent = text;
}

function choose(file) {
  if (!file) return;
  const fits = file.size <= Number(form.dataset.bytes);
  showProblem(fits ? "" : `The image is larger than ${form.dataset.megabytes} MB.`);
  image = fits ? file : null; // a file that was chosen earlier must not be sent by mistake
  if (preview.src) URL.revokeObjectURL(preview.src);
  if (fits) preview.src = URL.createObjectURL(file);
  preview.hidden = !fits;
  drop.classList.toggle("filled", fits);
  const label = fits ? "Choose another image" : "Choose an image";
  document.getElementById("chosen").textContent = label;
  if (fits) announce(`Image chosen: ${file.name || "pasted"}`);
}

function setRunning(controller) {
  running = controller;
  send.disabled = controller !== null;
  stop.hidden = controller === null;
}

async function ask() {
  if (running) return;
  const question = field.value.trim();
  showProblem("");
  if (!image) return refuse("Choose an image.", input);
  if (!question) return refuse("Write a question.", field);
  setRunning(new AbortController());
  try {
    const body = new Blob([JSON.stringify({ question }), "\n", image]);
    const headers = { "content-type": "application/octet-stream" };
    const response = await fetch("ask", { method: "POST", body, headers, signal: running.signal });
    if (!response.ok) return showProblem((await response.json()).error);
    const view = new AnswerView(question, image);
    try {
      for await (const event of readEvents(response.body)) view.handle(event);
    } finally {
      view.close(running.signal.aborted ? "Stopped." : LOST);
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    showProblem("The server cannot be reached, or rejected the image. Try again.");
  } finally {
    setRunning(null);
  }
}

function refuse(text, control) {
  showProblem(text);
  control.focus();
}

// Yields the lines of a stream as objects.
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let partial = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (partial + value).split("\n");
    partial = lines.pop();
    for (const line of lines) if (line) yield JSON.parse(line);
  }
}

// Shows a question and its events.
class AnswerView {
  constructor(question, file) {
    this.status = element("p", { class: "status working" }, "Sent");
    this.turns = element("ol", { class: "turns" });
    this.turn = null; // the current turn, until it ends
    this.ended = false;
    const preview = element("img", { src: URL.createObjectURL(file), alt: "Image of the question" });
    preview.addEventListener("load", () => URL.revokeObjectURL(preview.src));
    this.node = element("article", { class: "episode", "aria-label": question },
      element("header", {}, preview, element("div", {}, element("h2", {}, question), this.status)),
      this.turns);
    document.getElementById("empty")?.remove();
    document.getElementById("answers").prepend(this.node);
    this.node.scrollIntoView({ block: "nearest" });
  }

  setStatus(text, working = true) {
    this.status.textContent = text;
    this.status.classList.toggle("working", working);
  }

  handle(event) {
    const handler = {
      waiting: this.onWaiting, begun: this.onStart, drawn: this.onText, turn: this.onTurn,
      reply: this.onReply, end: this.onEnd, failed: this.onFailure,
    }[event.event];
    if (handler) handler.call(this, event);
  }

  onWaiting({ ahead }) {
    const questions = ahead === 1 ? "question is" : "questions are";
    this.setStatus(ahead ? `Waiting: ${ahead} ${questions} ahead` : "Waiting for a free lane");
  }

  onStart() {
    this.setStatus("Reading the image");
  }

  onText({ text }) {
    if (this.turn === null) {
      const index = this.turns.childElementCount + 1;
      const title = element("h3", {}, `Turn ${index}`);
      const reason = element("p", { class: "reason live" });
      const node = element("li", { class: "turn" }, title, reason);
      this.turn = { index, title, reason, text: "", node };
      this.turns.append(node);
    }
    this.turn.text += text;
    this.turn.reason.textContent = reasonIn(this.turn.text);
    this.setStatus(`Turn ${this.turn.index}: thinking`);
  }

  onTurn({ action, payload, reason, problem, text }) {
    if (this.turn === null) this.onText({ text });
    const { index, title, reason: reasonNode, node } = this.turn;
    node.classList.add(action || "none");
    title.textContent = `Turn ${index} · ${ACTIONS[action] || "No action"}`;
    reasonNode.classList.remove("live");
    reasonNode.textContent = problem || reason === null ? text : reason;
    if (problem) node.append(element("p", { class: "problem" }, `Malformed: ${problem}`));
    const query = { text_search: payload, image_search: "The whole image" }[action];
    if (query !== undefined) node.append(element("p", { class: "payload" }, query));
    this.lastTurn = node;
    this.turn = null;
    const activity = {
      text_search: `searching for “${payload}”`, image_search: "searching for the image",
    }[action];
    this.setStatus(`Turn ${index}: ${activity || "finished"}`);
    if (activity) announce(`Turn ${index}: ${activity}`);
  }

  onReply({ call, results, text }) {
    if (call) {
      const count = `${call.num_shown} ${call.num_shown === 1 ? "result" : "results"}`;
      const outcome = {
        refused: "refused: over the limit", empty: "no results", failed: "failed",
      }[call.status] || count;
      const time = call.status === "refused" ? "" : ` · ${call.seconds.toFixed(1)} s`;
      this.lastTurn.append(element("p", { class: `call ${call.status}` }, `${outcome}${time}`));
      announce(`Search: ${outcome}`);
    }
    if (results.length) {
      this.lastTurn.append(element("ol", { class: "results" }, results.map(resultNode)));
    } else if (text) {
      const body = () => element("p", { class: "reply-text" }, text);
      this.lastTurn.append(folded("Reply to the policy", body));
    }
    this.setStatus("Reading");
  }

  onEnd({ end, answer, error }) {
    this.ended = true;
    if (end === "error") return this.onFailure({ error });
    const text = answer === null
      ? ENDS[end] || "The policy gave no answer." : answer || "(an empty answer)";
    this.turns.before(element("div", { class: answer === null ? "final none" : "final" },
      element("h3", {}, answer === null ? "No answer" : "Answer"), element("p", {}, text)));
    this.setStatus("Done", false);
    announce(answer === null ? text : `Answer: ${text}`);
  }

  onFailure({ error }) {
    this.ended = true;
    this.turns.before(element("div", { class: "final bad", role: "alert" },
      element("h3", {}, "Failed"), element("p", {}, error)));
    this.setStatus("Failed", false);
  }

  // Called when no more events will come; `reason` is shown if there was no final event.
  close(reason) {
    if (this.ended) return;
    this.turn?.reason.classList.remove("live");
    this.setStatus(reason, false);
    announce(reason);
  }
}

// Returns the reasoning in an incomplete turn, or the whole text if it has another form.
function reasonIn(text) {
  const match = text.match(/^\s*<reason>([^]*?)(?:<\/reason>[^]*)?$/);
  if (match) return match[1].replace(/<\/?[a-z_]*$/, "").trimStart();
  return "<reason>".startsWith(text.trimStart()) ? "" : text;
}

function resultNode({ title, link, text, image: url }) {
  const address = link && (linkTo(link, link) || link);
  const image = url && url.startsWith("data:image/webp;base64,")
    ? element("img", { src: url, alt: title ? `Retrieved image: ${title}` : "Retrieved image" })
    : null;
  const paragraph = (body) => element("p", { class: "text" }, body);
  return element("li", {}, image, element("div", {},
    title ? element("p", { class: "title" }, title) : null,
    address ? element("p", { class: "link" }, address) : null,
    text.length > PREVIEW
      ? [paragraph(`${text.slice(0, PREVIEW).trimEnd()} …`),
        folded("Full text", () => paragraph(text))]
      : text ? paragraph(text) : null));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
stop.addEventListener("click", () => {
  running?.abort();
  field.focus();
});
input.addEventListener("change", () => choose(input.files[0]));
preview.addEventListener("error", () => {
  preview.hidden = true;
});
document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}
