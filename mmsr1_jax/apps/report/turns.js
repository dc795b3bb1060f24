// What happened in an episode: what the policy wrote, token by token, and what it read.

const ACTIONS = { answer: "Answer", image_search: "Image search", text_search: "Text search" };
// A token's likelihood under the policy that wrote it, from likely to unlikely; see the legend.
const LEVELS = [0.9, 0.5, 0.2, 0.05];
const LEVEL_NAMES = ["≥ 90 %", "50–90 %", "20–50 %", "5–20 %", "< 5 %"];

function level(logprob) {
  const below = LEVELS.findIndex((least) => Math.exp(logprob) >= least);
  return below < 0 ? LEVELS.length : below;
}

function legend() {
  return element("p", { class: "levels" },
    "Sampled tokens, which training learns from, by their probability: ",
    LEVEL_NAMES.map((name, i) => element("span", { class: `token p${i}` }, name)), " ",
    element("span", { class: "forced" }, "forced: no loss"));
}

// One turn of the policy and the answer to it.
function turnOf(turn, place, count) {
  const action = ACTIONS[turn.action] || "No action";
  const what = turn.action === "image_search" ? "the whole picture" : turn.payload;
  const name = `Turn ${place + 1}`;
  return element("section", { class: `turn ${turn.action || "none"}`, "aria-label": name },
    element("header", {},
      element("h3", {}, `${name} of ${count} · ${action}`),
      what ? element("p", { class: "payload" }, what) : null,
      turn.problem ? element("p", { class: "problem" }, `Badly formed: ${turn.problem}`) : null),
    element("div", { class: "written" },
      turn.pieces.length ? turn.pieces.map(written) : turn.reason),
    turn.pieces.some((piece) => piece.kind === "model")
      ? folded("Tokens as a table", () => tokensTable(turn, place)) : null,
    turn.calls.map(callOf),
    turn.reply === null ? null : replyOf(turn));
}

function written(piece) {
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

// The note over a token.
function tokenTip(event) {
  const token = event.target.closest(".written .token[data-logprob]");
  if (token === null) return tip.hide();
  const logprob = Number(token.dataset.logprob);
  const chance = `probability ${percent(Math.exp(logprob))}`;
  tip.show([visible(token.textContent), `log-prob ${logprob.toFixed(3)}`, chance], event);
}

// White space is seen; a token without text is a part of a character.
function visible(text) {
  const signs = { "\n": "⏎", "\t": "⇥", " ": "␣" };
  return text.replace(/[\n\t ]/g, (space) => signs[space]) || "(part of a character)";
}

function tokensTable(turn, place) {
  const pieces = turn.pieces.filter((piece) => piece.kind === "model");
  const drawnToo = pieces.some((piece) => piece.drawn);
  const value = (logprob) => (logprob === null ? "–" : logprob.toFixed(3));
  const rows = pieces.flatMap((piece) => (piece.tokens || piece.ids).map((token, i) => [
    piece.tokens ? visible(token) : `token ${token}`,
    value(piece.logprobs[i]),
    piece.logprobs[i] === null ? "–" : percent(Math.exp(piece.logprobs[i])),
    ...(drawnToo ? [value((piece.drawn || piece.logprobs)[i])] : []),
  ])).map((row, i) => [String(i), ...row]);
  const head = ["#", "token", "log-prob", "probability"].concat(drawnToo ? ["as drawn"] : []);
  return table(`Tokens of turn ${place + 1}`, head, rows, (column) => column !== 1);
}

function callOf(call) {
  const facts = { refused: ["refused", "not made"], unknown: [] }[call.status]
    || [call.status, `${call.num_shown} of ${call.num_results} results shown`,
      `${(call.seconds ?? 0).toFixed(2)} s`];
  return element("p", { class: `call ${call.status}` },
    element("strong", {}, ACTIONS[call.action] || call.action), " ", facts.join(" · "),
    call.notes.length ? element("span", { class: "notes" }, call.notes.join("; ")) : null);
}

// What was written to the policy after its turn: results as they were recorded, which no page can
// write itself, and the text as a whole.
function replyOf(turn) {
  const results = turn.calls.flatMap((call) => call.results);
  return element("div", { class: "reply" },
    results.length ? element("ol", { class: "results" }, results.map(resultOf)) : null,
    results.length
      ? folded("All that the policy read", () => raw(turn.reply))
      : element("div", { class: "said" }, raw(turn.reply)));
}

function resultOf({ link, title, text, pictures }) {
  return element("li", {}, pictures.map((place) => picture(place, "found picture")),
    element("div", {},
      link ? element("p", { class: "link" }, linkTo(link, link) || link) : null,
      title ? element("p", { class: "title" }, title) : null,
      text ? element("p", { class: "text" }, linked(text)) : null));
}

// Parts as they are, pictures between the texts.
function raw(parts) {
  return element("div", { class: "raw" }, parts.map((part) =>
    (typeof part === "number" ? picture(part, "picture") : linked(part))));
}
