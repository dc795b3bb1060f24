// The list of episodes with its filters, and the one that is shown.

const ROW = 76; // pixels, as in the style
const LETTERS = { image: "I", text: "T", answer: "A", none: "–" };
const VERDICTS = { right: "right", wrong: "wrong", open: "not judged", error: "could not be run" };
const NO_VALUE = "\u0000";

const browser = { rows: [], chosen: [], place: -1, texts: null, details: null, pictures: null };

function verdict(row) {
  if (row.end === "error") return "error";
  if (row.correct === null) return "open";
  return row.correct >= 0.5 ? "right" : "wrong";
}

function sequence(actions) {
  const names = actions.split(",").map((action) => (action === "none" ? "no action" : action));
  return names.join(" → ") || "nothing";
}

// What can be chosen by, those only of which there are several values.
const FACETS = [
  { name: "verdict", label: "Answer", of: verdict, show: (value) => VERDICTS[value] },
  { name: "actions", label: "Actions", of: (row) => row.actions, show: sequence },
  { name: "category", label: "Category", of: (row) => row.category },
  { name: "source", label: "Source", of: (row) => row.source },
  { name: "workflow", label: "Workflow", of: (row) => row.workflow },
  { name: "step", label: "Step", of: (row) => (row.step === null ? "" : String(row.step)) },
];

function browserOf(rows) {
  browser.rows = rows;
  const form = document.getElementById("filters");
  form.append(element("label", { class: "search" }, element("span", {}, "Text"),
    element("input", { type: "search", id: "text", autocomplete: "off",
      placeholder: "question, answer, turns, pages" })));
  for (const facet of FACETS) {
    const counts = new Map();
    for (const row of rows) counts.set(facet.of(row), (counts.get(facet.of(row)) || 0) + 1);
    if (counts.size < 2) continue;
    const values = [...counts].sort((a, b) => (facet.name === "step" ? a[0] - b[0] : b[1] - a[1]));
    form.append(element("label", {}, element("span", {}, facet.label),
      element("select", { id: `by-${facet.name}` },
        element("option", { value: NO_VALUE }, "all"),
        values.map(([value, count]) =>
          element("option", { value }, `${(facet.show || String)(value) || "none"} (${count})`)))));
  }
  form.addEventListener("input", () => filter());
  form.addEventListener("submit", (event) => event.preventDefault());
  const list = document.getElementById("list");
  list.addEventListener("scroll", () => renderRows(), { passive: true });
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) select(Number(option.dataset.place));
  });
  new ResizeObserver(() => renderRows()).observe(list);
  const episode = document.getElementById("episode");
  episode.addEventListener("pointerover", tokenTip);
  episode.addEventListener("pointerleave", () => tip.hide());
  filter();
}

// Takes the rows that fit the form.
function filter() {
  const wanted = FACETS
    .map((facet) => [facet, document.getElementById(`by-${facet.name}`)?.value ?? NO_VALUE])
    .filter(([, value]) => value !== NO_VALUE);
  const words = document.getElementById("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = words.length ? searched() : null;
  const shown = browser.chosen[browser.place];
  browser.chosen = browser.rows.map((_, i) => i).filter((i) =>
    wanted.every(([facet, value]) => facet.of(browser.rows[i]) === value)
    && words.every((word) => texts[i].includes(word)));
  const many = browser.chosen.length, all = browser.rows.length;
  const part = many === all ? "" : `${many} of `;
  document.getElementById("count").textContent = `${part}${all} episodes`;
  document.getElementById("rows").style.height = `${many * ROW}px`;
  browser.place = -1;
  select(Math.max(0, browser.chosen.indexOf(shown)), { scroll: true });
}

// All that an episode says, in small letters; made when text is first searched for.
function searched() {
  browser.texts ??= browser.rows.map((_, i) => {
    const { id, question, answers, turns } = detail(i);
    const written = turns.flatMap(({ pieces, reply, payload, calls }) => [
      ...pieces.map((piece) => piece.text ?? piece.tokens.join("")),
      payload, ...calls.flatMap((call) => call.notes),
      ...(reply || []).filter((part) => typeof part === "string"),
    ]);
    return [id, question, ...answers, ...written].filter(Boolean).join("\n").toLowerCase();
  });
  return browser.texts;
}

// An episode in full. They are lines of JSON; each is read when it is needed.
function detail(number) {
  browser.details ??= document.getElementById("details").textContent.split("\n");
  return JSON.parse(browser.details[number]);
}

function picture(place, alt) {
  browser.pictures ??= JSON.parse(document.getElementById("pictures").textContent);
  const src = browser.pictures.data[browser.pictures.of[place] ?? -1];
  if (src !== undefined) return element("img", { src, alt });
  return element("span", { class: "no-picture" }, alt && "picture not stored");
}

// Only the rows in sight are in the page.
function renderRows() {
  const list = document.getElementById("list"), rows = document.getElementById("rows");
  const { scrollTop, clientHeight } = list;
  const first = Math.max(0, Math.floor(scrollTop / ROW) - 4);
  const last = Math.min(browser.chosen.length, Math.ceil((scrollTop + clientHeight) / ROW) + 4);
  const there = new Map([...rows.children].map((node) => [Number(node.dataset.place), node]));
  for (const [place, node] of there) {
    if (place < first || place >= last || Number(node.dataset.number) !== browser.chosen[place]) {
      node.remove();
      there.delete(place);
    }
  }
  for (let place = first; place < last; place++) {
    const node = there.get(place) || rows.appendChild(rowOf(place));
    node.setAttribute("aria-setsize", browser.chosen.length);
    node.setAttribute("aria-selected", place === browser.place);
  }
}

function rowOf(place) {
  const number = browser.chosen[place], row = browser.rows[number], judged = verdict(row);
  const marks = { right: "✓", wrong: "✗", open: "?", error: "!" };
  const worth = typeof row.reward === "number" ? row.reward.toFixed(2) : "";
  const did = sequence(row.actions);
  const node = element("div", { role: "option", id: `row-${place}`, class: `row ${judged}`,
    "data-place": place, "data-number": number, "aria-posinset": place + 1 },
    picture(row.picture, ""),
    element("span", { class: "question" }, row.question || "(no question)"),
    element("span", { class: "worth" }, worth),
    element("span", { class: "given" },
      element("b", { role: "img", "aria-label": VERDICTS[judged] }, marks[judged]), " ",
      row.answer ?? (row.end === "error" ? "error" : "no answer")),
    element("span", { class: "acts", role: "img", "aria-label": did, title: did },
      row.actions.split(",").filter(Boolean).map((action) =>
        element("i", { class: action }, LETTERS[action] || "?"))));
  node.style.transform = `translateY(${place * ROW}px)`;
  return node;
}

// Shows the episode at a place of the list.
function select(place, { scroll = true } = {}) {
  const list = document.getElementById("list"), episode = document.getElementById("episode");
  tip.hide();
  if (!browser.chosen.length) {
    browser.place = -1;
    list.removeAttribute("aria-activedescendant");
    renderRows();
    episode.replaceChildren(element("p", { class: "empty" },
      browser.rows.length ? "No episode fits the filter." : "There are no episodes here."));
    return;
  }
  browser.place = Math.min(Math.max(place, 0), browser.chosen.length - 1);
  if (scroll) {
    const top = browser.place * ROW, least = top + ROW - list.clientHeight;
    list.scrollTop = Math.max(least, Math.min(top, list.scrollTop));
  }
  renderRows();
  list.setAttribute("aria-activedescendant", `row-${browser.place}`);
  const number = browser.chosen[browser.place];
  episode.replaceChildren(...shownOf(detail(number), browser.rows[number]));
  episode.scrollTop = 0;
  if (document.getElementById("episodes").hidden) return;
  history.replaceState(null, "", `#episode-${number + 1}`);
}

function shownOf(one, row) {
  const judged = verdict(row);
  const facts = [
    ["Right answer", one.answers.length ? one.answers.join(" · ") : "not known"],
    ["Policy's answer", one.answer ?? (one.error ? `error: ${one.error}` : "none")],
  ];
  const about = [["id", one.id], ["category", one.category], ["source", one.source],
    ["workflow", one.workflow], ["step", one.step], ["ended by", one.end]]
    .filter(([, value]) => value !== null && value !== "");
  const named = ([name, value]) => element("span", {}, `${name} `, element("b", {}, String(value)));
  const defined = ([name, value]) => [element("dt", {}, name), element("dd", {}, value)];
  const reward = Object.entries(one.reward).map(([name, value]) =>
    element("div", { class: name === "reward" ? "total" : null }, defined([name, number(value)])));
  return [
    element("header", { class: "question" },
      element("div", { class: "pictures" }, one.pictures.map((place, i) =>
        picture(place, `picture ${i + 1} of the question`))),
      element("div", { class: "asked" },
        element("p", { class: "about" }, about.map(named)),
        element("h2", {}, one.question || "(no question)"),
        element("dl", {}, facts.map(defined)),
        element("p", { class: "verdict" },
          element("span", { class: `pill ${judged}` }, VERDICTS[judged]), one.verdicts.map(named)),
        reward.length
          ? element("dl", { class: "reward", "aria-label": "Reward and its parts" }, reward)
          : null)),
    legend(),
    one.prompt.length ? folded("The prompt", () => raw(one.prompt), { class: "prompt" }) : null,
    one.turns.map((turn, i) => turnOf(turn, i, one.turns.length)),
  ].flat().filter(Boolean);
}
