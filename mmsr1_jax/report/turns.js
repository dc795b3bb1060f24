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
    || [call.status, `${call.shown} of ${call.found} results shown`,
      `${(call.seconds ?? 0).toFixed(2)} s`];
  return element("p", { class: `call ${call.status}` },
    element("strong", {}, ACTIONS[call.action] || call.action), " ", facts.join(" · "),
    call.notes.length ? element("span", { class: "notes" }, call.notes.join("; ")) : null);
}

// What was written to the policy after its turn.
function replyOf(turn) {
  const { results, others } = resultsIn(turn.reply);
  return element("div", { class: "reply" },
    results.length ? element("ol", { class: "results" }, results.map(resultOf)) : null,
    results.length
      ? folded("All that the policy read", () => raw(turn.reply))
      : element("div", { class: "said" }, raw(others)));
}

// Parts as lines, each a list of texts and numbers of pictures.
function linesOf(parts) {
  const lines = [[]];
  for (const part of parts) {
    if (typeof part === "number") {
      lines[lines.length - 1].push(part);
      continue;
    }
    part.split("\n").forEach((text, i) => {
      if (i) lines.push([]);
      if (text !== "") lines[lines.length - 1].push(text);
    });
  }
  return lines;
}

// The numbered results between the tags, which no page can write.
function resultsIn(parts) {
  const lines = linesOf(parts);
  const begin = lines.findIndex((line) => line[0] === "<information>");
  const end = lines.findIndex((line) => line[0] === "</information>");
  const results = [];
  for (const line of lines.slice(begin + 1, Math.max(begin + 1, end))) {
    const head = typeof line[0] === "string" && line[0].match(/^(\d+)\. /);
    if (head && Number(head[1]) === results.length + 1) {
      results.push([[line[0].slice(head[0].length), ...line.slice(1)]]);
    } else if (results.length) {
      results[results.length - 1].push(line);
    }
  }
  return { results, others: parts };
}

function resultOf(lines) {
  const pictures = lines.flat().filter((part) => typeof part === "number");
  const texts = lines.map((line) => line.filter((part) => typeof part === "string").join(""));
  const shown = texts.filter((text) => text.trim() && text.trim() !== "image:").map((text) => {
    const [, label, rest] = text.match(/^(link|title|summary): (.*)$/s) || [null, "", text];
    if (label !== "link") return element("p", { class: label || null }, linked(rest));
    return element("p", { class: "link" }, linkTo(rest.trim(), rest.trim()) || rest);
  });
  return element("li", {}, pictures.map((place) => picture(place, "found picture")),
    element("div", {}, shown));
}

// Parts as they are, pictures between the texts.
function raw(parts) {
  return element("div", { class: "raw" }, parts.map((part) =>
    (typeof part === "number" ? picture(part, "picture") : linked(part))));
}
