// How the run or the evaluation went as a whole.

const KINDS = { any: "any", image: "image only", text: "text only", both: "both", none: "none" };
const TILES = [
  ["accuracy", "Accuracy", percent], ["validation/accuracy", "Accuracy, held out", percent],
  ["reward", "Reward", number], ["search/any", "Episodes that search", percent],
  ["searches", "Searches an episode", number],
  ["tokens_sampled", "Tokens written", (value) => number(value, 0)],
  ["loss", "Loss", number], ["time/step", "Seconds a step", (value) => number(value, 1)],
];
// The first of the first three that there is says what is right.
const MATCHES = { score: "score", judge: "judge", em: "EM", subem: "SubEM" };
const NO_PHASE = new Set(["time/step", "time/tokens_per_second", "time/compiles"]);

function overviewOf(summary) {
  const { curves, skipped, rows, lines, lookedAt } = summary;
  const blocks = [workflowsOf(summary.results)];
  if (curves.steps) blocks.push(tilesOf(curves), chartsOf(curves));
  if (skipped.length) {
    blocks.push(element("section", { class: "notes" }, element("h2", {}, "Left out"),
      element("ul", {}, skipped.map((reason) => element("li", {}, reason)))));
  }
  if (lookedAt < lines) {
    blocks.push(note(`Of ${lines} episodes ${lookedAt} are shown, evenly spaced.`));
  }
  if (!summary.tokenTexts && rows.length) {
    blocks.push(note("No tokenizer that fits was found, so tokens are told by number only: "
      + "--model=DIR names the policy's."));
  }
  return blocks.filter(Boolean);
}

function note(text) {
  return element("p", { class: "note" }, text);
}

// The table of an evaluation's `results.json`; what is not in it is shown as a dash.
function workflowsOf(results) {
  const workflows = entries(results?.workflows);
  if (!workflows.length) return null;
  const has = (match) => workflows.some(([, one]) => one.accuracy?.[match]);
  const main = ["score", "judge"].find(has) || "em";
  const others = Object.keys(MATCHES).filter((match) => match !== main && has(match));
  const head = ["workflow", "questions", `right by ${MATCHES[main]}`, "95 % interval",
    ...others.map((match) => MATCHES[match]), "searches", "made / allowed", "that search",
    "by picture", "by text", "failed", "turns", "tokens"];
  const rows = workflows.map(([name, { accuracy, searches, ...one }]) => [
    element("b", {}, name), number(one.questions),
    percent(accuracy?.[main]?.mean), intervalOf(accuracy?.[main]),
    ...others.map((match) => percent(accuracy?.[match]?.mean)),
    number(searches?.an_episode, 2), percent(searches?.made_of_allowed), percent(searches?.share),
    percent(searches?.image_search?.share), percent(searches?.text_search?.share),
    percent(searches?.failed), number(one.turns, 2), number(one.tokens_sampled, 1)]);
  return element("section", {}, element("h2", {}, "Workflows"),
    table("Workflows", head, rows, afterFirst),
    note("Searches: of an episode. Made / allowed: of all that the limits allow. That search, "
      + "by picture, by text: shares of the episodes. Failed: share of the searches."),
    partsOf(workflows, main, "by_category", "category"),
    partsOf(workflows, main, "by_source", "source"),
    comparisonsOf(results.comparisons));
}

const afterFirst = (column) => column > 0;

// What an object holds of objects; nothing if it holds none.
function entries(value) {
  const is = (one) => one !== null && typeof one === "object" && !Array.isArray(one);
  return is(value) ? Object.entries(value).filter(([, one]) => is(one)) : [];
}

// A bar from 0 to 1 with the interval and the mean in it.
function intervalOf(right) {
  if (!Array.isArray(right?.interval)) return "–";
  const [low, high] = right.interval;
  const missing = right.no_verdict ? `, ${right.no_verdict} not judged` : "";
  return element("span", { class: "interval" },
    drawn("svg", { viewBox: "0 0 100 10", "aria-hidden": "true" },
      drawn("line", { class: "scale", x1: 0, x2: 100, y1: 5, y2: 5 }),
      drawn("line", { class: "range", x1: 100 * low, x2: 100 * high, y1: 5, y2: 5 }),
      drawn("circle", { class: "dot", cx: 100 * right.mean, cy: 5, r: 3.5 })),
    ` ${(100 * low).toFixed(1)} – ${(100 * high).toFixed(1)}${missing}`);
}

// What is right, of how many questions, and how often is searched, in each category or source.
function partsOf(workflows, match, field, what) {
  const all = workflows.flatMap(([, one]) => entries(one[field]).map(([name]) => name));
  const names = [...new Set(all)].sort();
  if (names.length < 2) return null;
  const of = (part) => [
    part ? `${percent(part.accuracy?.[match]?.mean)} of ${number(part.questions)}` : "–",
    percent(part?.searches?.share)];
  const rows = workflows.map(([workflow, one]) =>
    [element("b", {}, workflow), ...names.flatMap((name) => of(one[field]?.[name]))]);
  const head = ["workflow", ...names.flatMap((name) => [`${name}: right`, "search"])];
  const title = `By ${what}: right answers, and episodes that search`;
  return element("div", {}, element("h3", {}, title), table(title, head, rows, afterFirst));
}

function comparisonsOf(pairs) {
  if (!Array.isArray(pairs) || !pairs.length) return null;
  const points = (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(1)}`.replace("-", "−");
  const rows = pairs.map((pair) => [
    `${pair.a} − ${pair.b}`,
    number(pair.questions) + (pair.left_out ? `, ${number(pair.left_out)} left out` : ""),
    MATCHES[pair.match] || "",
    points(pair.difference), `${points(pair.interval?.[0])} to ${points(pair.interval?.[1])}`,
    number(pair.p)]);
  const head = ["workflows", "questions", "right by", "difference", "95 % interval", "p (McNemar)"];
  const title = "Differences between workflows, in points";
  return element("div", {}, element("h3", {}, title), table(title, head, rows, afterFirst));
}

function tilesOf({ steps, figures }) {
  const shown = TILES.filter(([name]) => figures[name]).slice(0, 6);
  const last = steps[steps.length - 1];
  return element("section", {}, element("h2", {}, `After step ${last}`),
    element("dl", { class: "tiles" }, shown.map(([name, label, format]) => {
      const there = figures[name].filter((value) => value !== null);
      return element("div", {}, element("dt", {}, label),
        element("dd", {}, element("b", {}, format(there[there.length - 1])),
          there.length > 1 ? element("span", {}, `first ${format(there[0])}`) : null));
    })));
}

function chartsOf({ steps, figures, mean_of }) {
  const pick = (...names) => names.filter(([name]) => figures[name])
    .map(([name, label]) => ({ name: label, values: figures[name] }));
  const under = (prefix, without = () => false) => Object.keys(figures)
    .filter((name) => name.startsWith(prefix) && !without(name))
    .map((name) => ({ name: name.slice(prefix.length), values: figures[name] }));
  const charts = [
    ["Reward and accuracy", pick(["reward", "reward"], ["accuracy", "accuracy"],
      ["format", "right form"], ["validation/accuracy", "accuracy, held out"])],
    ["Share of the episodes that search", Object.entries(KINDS).flatMap(([kind, label]) =>
      pick([`search/${kind}`, label]))],
    ["Searching, by category", under("search_by_category/")],
    ["Accuracy, by category", under("accuracy_by_category/")],
    ["Searches and turns of an episode", pick(["searches", "searches"], ["turns", "turns"])],
    ["Tokens of an episode", pick(["tokens_sampled", "written by the policy"], ["tokens", "all"])],
    ["What ends an episode, share", under("end/")],
    ["Tool calls that failed, share", pick(["tool/failed", "failed"])],
    ["Time of a step, seconds", under("time/", (name) => NO_PHASE.has(name)), { stacked: true }],
  ].filter(([, series]) => series.length);
  return element("section", {}, element("h2", {}, "Curves"),
    note(`${mean_of > 1 ? `Each point is the mean of ${mean_of} steps. ` : ""}`
      + `${steps.length > SMOOTH ? "Thin: each point. Thick: the mean of the last few." : ""}`),
    element("div", { class: "charts" },
      charts.map(([title, series, options]) => chart(title, steps, series, options)),
      anyOf(steps, figures)));
}

// A chart of whatever figure is chosen.
function anyOf(steps, figures) {
  const names = Object.keys(figures).sort();
  const first = ["update/kl", "loss"].find((name) => figures[name]) || names[0];
  const place = element("div", {});
  const show = (name) => place.replaceChildren(
    chart(name, steps, [{ name, values: figures[name] }], { least: null }));
  show(first);
  return element("div", { class: "any" },
    element("label", {}, "Any figure ",
      element("select", { on: { change: (event) => show(event.target.value) } },
        names.map((name) => element("option", { value: name, selected: name === first }, name)))),
    place);
}
