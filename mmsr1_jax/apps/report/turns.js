// Turns of an episode: sampled tokens with their log-probs, tool calls and their results.

const ACTIONS = { answer: "Answer", image_search: "Image search", text_search: "Text search" };
// Lower bounds of the levels of a token's probability under the policy, see the legend.
const LEVELS = [0.9, 0.5, 0.2, 0.05];
const LEVEL_NAMES = ["≥ 90 %", "50–90 %", "20–50 %", "5–20 %", "< 5 %"];

function level(logprob) {
  const below = LEVELS.findIndex((bound) => Math.exp(logprob) >= bound);
  return below < 0 ? LEVELS.length : below;
}

function legend() {
  return element("p", { class: "levels" },
    "Sampled tokens, which are trained on, by their probability: ",
    LEVEL_NAMES.map((name, i) => element("span", { class: `token p${i}` }, name)), " ",
    element("span", { class: "forced" }, "forced, without loss"));
}

// Creates a turn of the policy and the reply to it.
function turnOf(turn, index, count) {
  const action = ACTIONS[turn.action] || "No action";
  const payload = turn.action === "image_search" ? "the whole image" : turn.payload;
  const name = `Turn ${index + 1}`;
  return element("section", { class: `turn ${turn.action || "none"}`, "aria-label": name },
    element("header", {},
      element("h3", {}, `${name} of ${count} · ${action}`),
      payload ? element("p", { class: "payload" }, payload) : null,
      turn.problem ? element("p", { class: "problem" }, `Malformed: ${turn.problem}`) : null),
    element("div", { class: "written" },
      turn.pieces.length ? turn.pieces.map(pieceOf) : turn.reason),
    turn.pieces.some((piece) => piece.kind === "model")
      ? folded("Tokens as a table", () => tokensTable(turn, index)) : null,
    turn.calls.map(callOf),
    turn.reply === null ? null : replyOf(turn));
}

function pieceOf(piece) {
  if (piece.kind !== "model") {
    return element("span", { class: "forced", title: "forced: not sampled, no loss" }, piece.text);
  }
  if (!piece.tokens) return element("span", { class: "token" }, piece.text);
  return piece.tokens.map((text, i) => {
    const logprob = piece.logprobs[i];
    const kind = logprob === null ? "token" : `token p${level(logprob)}`;
    return element("span", { class: kind, "data-logprob": logprob }, text);
  });
}

// Shows the tooltip of a token.
function tokenTip(event) {
  const token = event.target.closest(".written .token[data-logprob]");
  if (token === null) return tip.hide();
  const logprob = Number(token.dataset.logprob);
  const probability = `probability ${percent(Math.exp(logprob))}`;
  tip.show([visible(token.textContent), `log-prob ${logprob.toFixed(3)}`, probability], event);
}

// Returns a token with visible white space. A token without text is part of a character.
function visible(text) {
  const symbols = { "\n": "⏎", "\t": "⇥", " ": "␣" };
  return text.replace(/[\n\t ]/g, (space) => symbols[space]) || "(part of a character)";
}

function tokensTable(turn, index) {
  const pieces = turn.pieces.filter((piece) => piece.kind === "model");
  const hasSampling = pieces.some((piece) => piece.sampling_logprobs);
  const value = (logprob) => (logprob === null ? "–" : logprob.toFixed(3));
  const rows = pieces.flatMap((piece) => (piece.tokens || piece.ids).map((token, i) => [
    piece.tokens ? visible(token) : `token ${token}`,
    value(piece.logprobs[i]),
    piece.logprobs[i] === null ? "–" : percent(Math.exp(piece.logprobs[i])),
    ...(hasSampling ? [value((piece.sampling_logprobs || piece.logprobs)[i])] : []),
  ])).map((row, i) => [String(i), ...row]);
  const head = ["#", "token", "log-prob", "probability",
    ...(hasSampling ? ["sampling log-prob"] : [])];
  return table(`Tokens of turn ${index + 1}`, head, rows, (column) => column !== 1);
}

function callOf(call) {
  const facts = { refused: ["refused"], unknown: [] }[call.status]
    || [call.status, `${call.num_shown} of ${call.num_results} results shown`,
      `${(call.seconds ?? 0).toFixed(2)} s`];
  return element("p", { class: `call ${call.status}` },
    element("strong", {}, ACTIONS[call.action] || call.action), " ", facts.join(" · "),
    call.notes.length ? element("span", { class: "notes" }, call.notes.join("; ")) : null);
}

// Creates the reply to the policy after its turn: the recorded results, which no page can forge,
// and the whole text.
function replyOf(turn) {
  const results = turn.calls.flatMap((call) => call.results);
  return element("div", { class: "reply" },
    results.length ? element("ol", { class: "results" }, results.map(resultOf)) : null,
    results.length
      ? folded("Full reply to the policy", () => raw(turn.reply))
      : element("div", {}, raw(turn.reply)));
}

function resultOf({ link, title, text, images }) {
  return element("li", {}, images.map((index) => imageOf(index, "retrieved image")),
    element("div", {},
      link ? element("p", { class: "link" }, linkTo(link, link) || link) : null,
      title ? element("p", { class: "title" }, title) : null,
      text ? element("p", { class: "text" }, linked(text)) : null));
}

// Creates texts with images between them.
function raw(parts) {
  return element("div", { class: "raw" }, parts.map((part) =>
    (typeof part === "number" ? imageOf(part, "image") : linked(part))));
}
