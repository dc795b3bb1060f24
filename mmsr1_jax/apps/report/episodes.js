// The list of episodes with its filters, and the selected episode.

const ROW_HEIGHT = 76; // pixels, as in style.css
const LETTERS = { image: "I", text: "T", answer: "A", none: "–" };
const VERDICTS = {
  correct: "correct", wrong: "wrong", open: "not judged", error: "could not be run",
};
const NO_VALUE = "\u0000";

// `matching` has the indices of the rows that pass the filters; `position` is an index into it.
const browser = {
  rows: [], matching: [], position: -1, texts: null, details: null, images: null,
};

function verdict(row) {
  if (row.end === "error") return "error";
  if (row.correct === null) return "open";
  return row.correct >= 0.5 ? "correct" : "wrong";
}

function sequence(actions) {
  const names = actions.split(",").map((action) => (action === "none" ? "no action" : action));
  return names.join(" → ") || "none";
}

// Fields to filter by. A field with only one value gets no filter.
const FACETS = [
  { name: "verdict", label: "Answer", value: verdict, format: (value) => VERDICTS[value] },
  { name: "actions", label: "Actions", value: (row) => row.actions, format: sequence },
  { name: "category", label: "Category", value: (row) => row.category },
  { name: "source", label: "Source", value: (row) => row.source },
  { name: "workflow", label: "Workflow", value: (row) => row.workflow },
  { name: "step", label: "Step", value: (row) => (row.step === null ? "" : String(row.step)) },
];

function fillBrowser(rows) {
  browser.rows = rows;
  const form = document.getElementById("filters");
  form.append(element("label", { class: "search" }, element("span", {}, "Text"),
    element("input", { type: "search", id: "text", autocomplete: "off",
      placeholder: "question, answer, turns, pages" })));
  for (const facet of FACETS) {
    const counts = new Map();
    for (const row of rows) counts.set(facet.value(row), (counts.get(facet.value(row)) || 0) + 1);
    if (counts.size < 2) continue;
    const values = [...counts].sort((a, b) => (facet.name === "step" ? a[0] - b[0] : b[1] - a[1]));
    form.append(element("label", {}, element("span", {}, facet.label),
      element("select", { id: `by-${facet.name}` },
        element("option", { value: NO_VALUE }, "all"),
        values.map(([value, count]) =>
          element("option", { value }, `${(facet.format || String)(value) || "none"} (${count})`)))));
  }
  form.addEventListener("input", () => filter());
  form.addEventListener("submit", (event) => event.preventDefault());
  const list = document.getElementById("list");
  list.addEventListener("scroll", () => renderRows(), { passive: true });
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) select(Number(option.dataset.position));
  });
  new ResizeObserver(() => renderRows()).observe(list);
  const episode = document.getElementById("episode");
  episode.addEventListener("pointerover", tokenTip);
  episode.addEventListener("pointerleave", () => tip.hide());
  filter();
}

// Applies the filters of the form.
function filter() {
  const selected = FACETS
    .map((facet) => [facet, document.getElementById(`by-${facet.name}`)?.value ?? NO_VALUE])
    .filter(([, value]) => value !== NO_VALUE);
  const words = document.getElementById("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = words.length ? searchableTexts() : null;
  const shown = browser.matching[browser.position];
  browser.matching = browser.rows.map((_, i) => i).filter((i) =>
    selected.every(([facet, value]) => facet.value(browser.rows[i]) === value)
    && words.every((word) => texts[i].includes(word)));
  const count = browser.matching.length, total = browser.rows.length;
  const label = count === total ? `${total} episodes` : `${count} of ${total} episodes`;
  document.getElementById("count").textContent = label;
  document.getElementById("rows").style.height = `${count * ROW_HEIGHT}px`;
  browser.position = -1;
  select(Math.max(0, browser.matching.indexOf(shown)));
}

// Returns the lower-case text of each episode, computed at the first search.
function searchableTexts() {
  browser.texts ??= browser.rows.map((_, i) => {
    const { id, question, answers, turns } = detail(i);
    const parts = turns.flatMap(({ pieces, reply, payload, calls }) => [
      ...pieces.map((piece) => piece.text ?? piece.tokens.join("")),
      payload, ...calls.flatMap((call) => call.notes),
      ...(reply || []).filter((part) => typeof part === "string"),
    ]);
    return [id, question, ...answers, ...parts].filter(Boolean).join("\n").toLowerCase();
  });
  return browser.texts;
}

// Returns a whole episode. Each is a line of JSON, which is parsed when it is needed.
function detail(index) {
  browser.details ??= document.getElementById("details").textContent.split("\n");
  return JSON.parse(browser.details[index]);
}

function imageOf(index, alt) {
  browser.images ??= JSON.parse(document.getElementById("images").textContent);
  const src = browser.images.urls[browser.images.url_indices[index] ?? -1];
  if (src !== undefined) return element("img", { src, alt });
  return element("span", { class: "no-image" }, alt && "image not available");
}

// Updates the rows in the page, which are only the visible ones and some around them.
function renderRows() {
  const list = document.getElementById("list"), rows = document.getElementById("rows");
  const { scrollTop, clientHeight } = list;
  const count = browser.matching.length;
  const first = Math.max(0, Math.floor(scrollTop / ROW_HEIGHT) - 4);
  const last = Math.min(count, Math.ceil((scrollTop + clientHeight) / ROW_HEIGHT) + 4);
  const nodes = new Map([...rows.children].map((node) => [Number(node.dataset.position), node]));
  for (const [position, node] of nodes) {
    const stale = Number(node.dataset.index) !== browser.matching[position];
    if (position < first || position >= last || stale) {
      node.remove();
      nodes.delete(position);
    }
  }
  for (let position = first; position < last; position++) {
    const node = nodes.get(position) || rows.appendChild(rowOf(position));
    node.setAttribute("aria-setsize", count);
    node.setAttribute("aria-selected", position === browser.position);
  }
}

function rowOf(position) {
  const index = browser.matching[position], row = browser.rows[index], result = verdict(row);
  const symbols = { correct: "✓", wrong: "✗", open: "?", error: "!" };
  const reward = typeof row.reward === "number" ? row.reward.toFixed(2) : "";
  const actions = sequence(row.actions);
  const node = element("div", { role: "option", id: `row-${position}`, class: `row ${result}`,
    "data-position": position, "data-index": index, "aria-posinset": position + 1 },
    imageOf(row.image, ""),
    element("span", { class: "question" }, row.question || "(no question)"),
    element("span", { class: "score" }, reward),
    element("span", { class: "given" },
      element("b", { role: "img", "aria-label": VERDICTS[result] }, symbols[result]), " ",
      row.answer ?? (row.end === "error" ? "error" : "no answer")),
    element("span", { class: "actions", role: "img", "aria-label": actions, title: actions },
      row.actions.split(",").filter(Boolean).map((action) =>
        element("i", { class: action }, LETTERS[action] || "?"))));
  node.style.transform = `translateY(${position * ROW_HEIGHT}px)`;
  return node;
}

// Selects the episode at a position of the list, and scrolls to it.
function select(position) {
  const list = document.getElementById("list"), episode = document.getElementById("episode");
  tip.hide();
  if (!browser.matching.length) {
    browser.position = -1;
    list.removeAttribute("aria-activedescendant");
    renderRows();
    episode.replaceChildren(element("p", { class: "empty" },
      browser.rows.length ? "No episode matches the filter." : "The report has no episodes."));
    return;
  }
  browser.position = Math.min(Math.max(position, 0), browser.matching.length - 1);
  const top = browser.position * ROW_HEIGHT, minScroll = top + ROW_HEIGHT - list.clientHeight;
  list.scrollTop = Math.max(minScroll, Math.min(top, list.scrollTop));
  renderRows();
  list.setAttribute("aria-activedescendant", `row-${browser.position}`);
  const index = browser.matching[browser.position];
  episode.replaceChildren(...episodeNodes(detail(index), browser.rows[index]));
  episode.scrollTop = 0;
  if (document.getElementById("episodes").hidden) return;
  history.replaceState(null, "", `#episode-${index + 1}`);
}

function episodeNodes(episode, row) {
  const result = verdict(row);
  const answer = episode.answer ?? (episode.error ? `error: ${episode.error}` : "none");
  const facts = [
    ["Gold answer", episode.answers.length ? episode.answers.join(" · ") : "unknown"],
    ["Policy's answer", answer],
  ];
  const about = [["id", episode.id], ["category", episode.category], ["source", episode.source],
    ["workflow", episode.workflow], ["step", episode.step], ["end", episode.end]]
    .filter(([, value]) => value !== null && value !== "");
  const named = ([name, value]) => element("span", {}, `${name} `, element("b", {}, String(value)));
  const defined = ([name, value]) => [element("dt", {}, name), element("dd", {}, value)];
  const reward = Object.entries(episode.reward).map(([name, value]) =>
    element("div", { class: name === "reward" ? "total" : null }, defined([name, number(value)])));
  return [
    element("header", { class: "question" },
      element("div", { class: "images" }, episode.images.map((index, i) =>
        imageOf(index, `image ${i + 1} of the question`))),
      element("div", { class: "facts" },
        element("p", { class: "about" }, about.map(named)),
        element("h2", {}, episode.question || "(no question)"),
        element("dl", {}, facts.map(defined)),
        element("p", { class: "verdict" },
          element("span", { class: `pill ${result}` }, VERDICTS[result]),
          episode.verdicts.map(named)),
        reward.length
          ? element("dl", { class: "reward", "aria-label": "Reward and its components" }, reward)
          : null)),
    legend(),
    episode.prompt.length
      ? folded("Prompt", () => raw(episode.prompt), { class: "prompt" }) : null,
    episode.turns.map((turn, i) => turnOf(turn, i, episode.turns.length)),
  ].flat().filter(Boolean);
}
