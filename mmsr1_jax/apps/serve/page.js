// Asks, and shows what happens as it arrives. Whatever comes from outside goes through text nodes.
"use strict";

const ACTIONS = { answer: "Answer", image_search: "Image search", text_search: "Text search" };
const ENDS = {
  turns: "It used all its turns and gave no answer.",
  tokens: "It ran out of room and gave no answer.",
};
const LOST = "The connection was lost before the answer. Ask again.";
const LONG = 320; // characters of a result that are shown at once

const form = document.getElementById("ask");
const field = document.getElementById("question");
const input = document.getElementById("picture");
const drop = document.getElementById("drop");
const preview = document.getElementById("preview");
const send = document.getElementById("send");
const stop = document.getElementById("stop");

let picture = null; // the chosen file
let running = null; // an AbortController while a question is under way

function mistake(text) {
  document.getElementById("mistake").textContent = text;
}

// Read out by screen readers.
function announce(text) {
  document.getElementById("live").textContent = text;
}

function choose(file) {
  if (!file) return;
  const fits = file.size <= Number(form.dataset.bytes);
  mistake(fits ? "" : `The picture is larger than ${form.dataset.megabytes} MB.`);
  picture = fits ? file : null; // never one that was chosen before, by mistake
  if (preview.src) URL.revokeObjectURL(preview.src);
  if (fits) preview.src = URL.createObjectURL(file);
  preview.hidden = !fits;
  drop.classList.toggle("filled", fits);
  document.getElementById("chosen").textContent = fits ? "Choose another picture" : "Choose a picture";
  if (fits) announce(`Picture chosen: ${file.name || "pasted"}`);
}

function setRunning(controller) {
  running = controller;
  send.disabled = controller !== null;
  stop.hidden = controller === null;
}

async function ask() {
  if (running) return;
  const question = field.value.trim();
  mistake("");
  if (!picture) return refuse("Choose a picture.", input);
  if (!question) return refuse("Write a question.", field);
  setRunning(new AbortController());
  try {
    const body = new Blob([JSON.stringify({ question }), "\n", picture]);
    const headers = { "content-type": "application/octet-stream" };
    const reply = await fetch("ask", { method: "POST", body, headers, signal: running.signal });
    if (!reply.ok) return mistake((await reply.json()).error);
    const shown = new Answer(question, picture);
    try {
      for await (const event of eventsOf(reply.body)) shown.take(event);
    } finally {
      shown.close(running.signal.aborted ? "Stopped." : LOST);
    }
  } catch (error) {
    if (error.name !== "AbortError") mistake("The server cannot be reached, or refused the picture. Try again.");
  } finally {
    setRunning(null);
  }
}

function refuse(text, where) {
  mistake(text);
  where.focus();
}

// The lines of a stream, as objects.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) yield JSON.parse(line);
  }
}

// A question, and what happens to it.
class Answer {
  constructor(question, file) {
    this.status = element("p", { class: "status working" }, "Sent");
    this.turns = element("ol", { class: "turns" });
    this.turn = null; // the one under way
    this.over = false;
    const image = element("img", { src: URL.createObjectURL(file), alt: "Picture of the question" });
    image.addEventListener("load", () => URL.revokeObjectURL(image.src));
    this.node = element("article", { class: "episode", "aria-label": question },
      element("header", {}, image, element("div", {}, element("h2", {}, question), this.status)),
      this.turns);
    document.getElementById("empty")?.remove();
    document.getElementById("answers").prepend(this.node);
    this.node.scrollIntoView({ block: "nearest" });
  }

  say(text, working = true) {
    this.status.textContent = text;
    this.status.classList.toggle("working", working);
  }

  take(event) {
    const act = { waiting: this.waiting, begun: this.begun, drawn: this.drawn, turn: this.read,
                  reply: this.reply, end: this.end, failed: this.failed }[event.event];
    if (act) act.call(this, event);
  }

  waiting({ ahead }) {
    this.say(ahead ? `Waiting: ${ahead} ${ahead === 1 ? "question is" : "questions are"} first` : "Waiting for a free lane");
  }

  begun() {
    this.say("Looking at the picture");
  }

  drawn({ text }) {
    if (this.turn === null) {
      const number = this.turns.childElementCount + 1;
      const title = element("h3", {}, `Turn ${number}`);
      const written = element("p", { class: "reason live" });
      this.turn = { number, title, written, text: "", node: element("li", { class: "turn" }, title, written) };
      this.turns.append(this.turn.node);
    }
    this.turn.text += text;
    this.turn.written.textContent = reasonIn(this.turn.text);
    this.say(`Turn ${this.turn.number}: thinking`);
  }

  read(event) {
    if (this.turn === null) this.drawn({ text: event.text });
    const { number, title, written, node } = this.turn;
    const action = ACTIONS[event.action] || "No action";
    node.classList.add(event.action || "none");
    title.textContent = `Turn ${number} · ${action}`;
    written.classList.remove("live");
    written.textContent = event.problem || event.reason === null ? event.text : event.reason;
    if (event.problem) node.append(element("p", { class: "problem" }, `Badly formed: ${event.problem}`));
    if (event.action === "text_search") node.append(element("p", { class: "payload" }, event.payload));
    if (event.action === "image_search") node.append(element("p", { class: "payload" }, "The whole picture"));
    this.last = node;
    this.turn = null;
    const doing = { text_search: `searching for “${event.payload}”`, image_search: "looking the picture up" }[event.action];
    this.say(doing ? `Turn ${number}: ${doing}` : `Turn ${number} is over`);
    if (doing) announce(`Turn ${number}: ${doing}`);
  }

  reply({ call, results, said }) {
    if (call) {
      const told = { refused: "not made: over the limit", empty: "found nothing", failed: "failed" }[call.status]
        || `${call.num_shown} ${call.num_shown === 1 ? "result" : "results"}`;
      const time = call.status === "refused" ? "" : ` · ${call.seconds.toFixed(1)} s`;
      this.last.append(element("p", { class: `call ${call.status}` }, `${told}${time}`));
      announce(`Search: ${told}`);
    }
    if (results.length) this.last.append(element("ol", { class: "results" }, results.map(resultOf)));
    else if (said) this.last.append(folded("What the policy was told", () => element("p", { class: "said" }, said)));
    this.say("Reading");
  }

  end({ end, answer, error }) {
    this.over = true;
    if (end === "error") return this.failed({ error });
    const text = answer === null ? ENDS[end] || "It gave no answer." : answer || "(an empty answer)";
    this.turns.before(element("div", { class: answer === null ? "final none" : "final" },
      element("h3", {}, answer === null ? "No answer" : "Answer"), element("p", {}, text)));
    this.say("Done", false);
    announce(answer === null ? text : `Answer: ${text}`);
  }

  failed({ error }) {
    this.over = true;
    this.turns.before(element("div", { class: "final bad", role: "alert" },
      element("h3", {}, "It did not work"), element("p", {}, error)));
    this.say("Failed", false);
  }

  // Nothing more will come; `why` is said where it was not at its end.
  close(why) {
    if (this.over) return;
    this.turn?.written.classList.remove("live");
    this.say(why, false);
    announce(why);
  }
}

// What is written so far without its tags: the reasoning, or all of it where it has no such form.
function reasonIn(text) {
  const begun = text.match(/^\s*<reason>([^]*?)(?:<\/reason>[^]*)?$/);
  if (begun) return begun[1].replace(/<\/?[a-z_]*$/, "").trimStart();
  return "<reason>".startsWith(text.trimStart()) ? "" : text;
}

function resultOf({ title, link, text, picture: url }) {
  const address = link && (linkTo(link, link) || link);
  const image = url && url.startsWith("data:image/webp;base64,")
    ? element("img", { src: url, alt: title ? `Found picture: ${title}` : "Found picture" }) : null;
  return element("li", {}, image, element("div", {},
    title ? element("p", { class: "title" }, title) : null,
    address ? element("p", { class: "link" }, address) : null,
    text.length > LONG
      ? [element("p", { class: "text" }, `${text.slice(0, LONG).trimEnd()} …`), folded("All of it", () => element("p", { class: "text" }, text))]
      : text ? element("p", { class: "text" }, text) : null));
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
