// Overview: results of an evaluation, and metrics and traces of a run.

const TILES = [
  ["accuracy", "Accuracy", percent], ["validation/accuracy", "Validation accuracy", percent],
  ["reward", "Reward", number], ["search/any", "Episodes that search", percent],
  ["searches", "Searches per episode", number],
  ["tokens_sampled", "Sampled tokens", (value) => number(value, 0)],
  ["loss", "Loss", number], ["time/step", "Seconds per step", (value) => number(value, 1)],
];
const CRITERIA = { score: "score", judge: "judge", em: "EM", subem: "SubEM" };
const SMOOTHED = 25; // longer runs have smoothed curves, see charts.py

function overviewOf(summary, charts) {
  const { curves, skipped, rows, numLines, numRead } = summary;
  const blocks = [workflowsOf(summary.results)];
  if (curves.steps) blocks.push(tilesOf(curves), chartsOf(curves, charts));
  blocks.push(tracesOf(summary.traces));
  if (skipped.length) {
    blocks.push(element("section", { class: "notes" }, element("h2", {}, "Skipped"),
      element("ul", {}, skipped.map((reason) => element("li", {}, reason)))));
  }
  if (numRead < numLines) {
    blocks.push(note(`${numRead} of ${numLines} episodes are shown, evenly spaced.`));
  }
  if (!summary.hasTokenTexts && rows.length) {
    blocks.push(note("No matching tokenizer was found, so tokens are shown by number: name the "
      + "policy with --model=DIR."));
  }
  return blocks.filter(Boolean);
}

function note(text) {
  return element("p", { class: "note" }, text);
}

// Creates the table of an evaluation's `results.json`; missing values are shown as dashes.
function workflowsOf(results) {
  const workflows = entries(results?.workflows);
  if (!workflows.length) return null;
  const has = (criterion) => workflows.some(([, metrics]) => metrics.accuracy?.[criterion]);
  const main = ["score", "judge"].find(has) || "em";
  const others = Object.keys(CRITERIA).filter((name) => name !== main && has(name));
  const head = ["workflow", "questions", `correct by ${CRITERIA[main]}`, "95 % interval",
    ...others.map((name) => CRITERIA[name]), "searches", "made / allowed", "that search",
    "by image", "by text", "failed", "turns", "tokens"];
  const rows = workflows.map(([name, { accuracy, searches, ...metrics }]) => [
    element("b", {}, name), number(metrics.questions),
    percent(accuracy?.[main]?.mean), intervalOf(accuracy?.[main]),
    ...others.map((criterion) => percent(accuracy?.[criterion]?.mean)),
    number(searches?.per_episode, 2), percent(searches?.fraction_of_allowed),
    percent(searches?.episode_fraction), percent(searches?.image_search?.episode_fraction),
    percent(searches?.text_search?.episode_fraction), percent(searches?.failed),
    number(metrics.turns, 2), number(metrics.tokens_sampled, 1)]);
  return element("section", {}, element("h2", {}, "Workflows"),
    table("Workflows", head, rows, afterFirst),
    note("Searches: mean per episode. Made / allowed: fraction of the allowed searches. That "
      + "search, by image, by text: fractions of the episodes. Failed: fraction of the searches."),
    groupsOf(workflows, main, "by_category", "category"),
    groupsOf(workflows, main, "by_source", "source"),
    comparisonsOf(results.comparisons));
}

const afterFirst = (column) => column > 0;

// Returns the entries of an object whose values are objects.
function entries(value) {
  const isObject = (item) => item !== null && typeof item === "object" && !Array.isArray(item);
  return isObject(value) ? Object.entries(value).filter(([, item]) => isObject(item)) : [];
}

function intervalOf(accuracy) {
  if (!Array.isArray(accuracy?.interval)) return "–";
  const [low, high] = accuracy.interval.map((bound) => (100 * bound).toFixed(1));
  const missing = accuracy.no_verdict ? `, ${accuracy.no_verdict} not judged` : "";
  return `${low} – ${high}${missing}`;
}

// Creates a table of accuracy, number of questions and search ratio by category or source.
function groupsOf(workflows, criterion, field, label) {
  const all = workflows.flatMap(([, metrics]) => entries(metrics[field]).map(([name]) => name));
  const names = [...new Set(all)].sort();
  if (names.length < 2) return null;
  const cells = (group) => [
    group ? `${percent(group.accuracy?.[criterion]?.mean)} of ${number(group.questions)}` : "–",
    percent(group?.searches?.episode_fraction)];
  const rows = workflows.map(([workflow, metrics]) =>
    [element("b", {}, workflow), ...names.flatMap((name) => cells(metrics[field]?.[name]))]);
  const head = ["workflow", ...names.flatMap((name) => [`${name}: correct`, "search"])];
  const title = `By ${label}: correct answers, and episodes that search`;
  return element("div", {}, element("h3", {}, title), table(title, head, rows, afterFirst));
}

function comparisonsOf(pairs) {
  if (!Array.isArray(pairs) || !pairs.length) return null;
  const points = (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(1)}`.replace("-", "−");
  const rows = pairs.map((pair) => [
    `${pair.a} − ${pair.b}`,
    number(pair.questions) + (pair.skipped ? `, ${number(pair.skipped)} skipped` : ""),
    CRITERIA[pair.criterion] || "",
    points(pair.difference), `${points(pair.interval?.[0])} to ${points(pair.interval?.[1])}`,
    number(pair.p)]);
  const head = ["workflows", "questions", "correct by", "difference", "95 % interval",
    "p (McNemar)"];
  const title = "Differences between workflows, in percentage points";
  return element("div", {}, element("h3", {}, title), table(title, head, rows, afterFirst));
}

function tilesOf({ steps, metrics }) {
  const shown = TILES.filter(([name]) => metrics[name]).slice(0, 6);
  return element("section", {}, element("h2", {}, `After step ${steps.at(-1)}`),
    element("dl", { class: "tiles" }, shown.map(([name, label, format]) => {
      const values = metrics[name].filter((value) => value !== null);
      return element("div", {}, element("dt", {}, label),
        element("dd", {}, element("b", {}, format(values.at(-1))),
          values.length > 1 ? element("span", {}, `first ${format(values[0])}`) : null));
    })));
}

function chartsOf(curves, charts) {
  const { steps, steps_per_point: stepsPerPoint } = curves;
  return element("section", {}, element("h2", {}, "Curves"),
    note(`${stepsPerPoint > 1 ? `Each point is the mean of ${stepsPerPoint} steps. ` : ""}`
      + `${steps.length > SMOOTHED ? "Thin: each point. Thick: moving average." : ""}`),
    element("div", { class: "charts" },
      charts.panels.map((chart) => figureOf(chart, curves)),
      metricSelector(curves, charts)));
}

// Creates the figure of a chart that charts.py drew.
function figureOf({ title, alt, svg, series }, { steps, metrics }) {
  const head = ["step", ...series.map(({ label }) => label)];
  const rows = () => steps.map((step, i) =>
    [String(step), ...series.map(({ metric }) => number(metrics[metric][i], 4))]);
  return element("figure", { class: "chart" },
    element("figcaption", {}, title),
    element("img", { alt, src: `data:image/svg+xml,${encodeURIComponent(svg)}` }),
    folded("Values as a table", () => table(title, head, rows())));
}

// Creates a selector of a metric with its chart.
function metricSelector(curves, charts) {
  const names = Object.keys(charts.metrics);
  const first = ["update/kl", "loss"].find((name) => charts.metrics[name]) || names[0];
  const container = element("div", {});
  const show = (name) => container.replaceChildren(figureOf(charts.metrics[name], curves));
  show(first);
  return element("div", { class: "any" },
    element("label", {}, "Metric ",
      element("select", { on: { change: (event) => show(event.target.value) } },
        names.map((name) => element("option", { value: name, selected: name === first }, name)))),
    container);
}

// Lists the profile and the timelines of a run; their addresses are relative to the page.
function tracesOf(addresses) {
  if (!addresses.length) return null;
  return element("section", { class: "traces" }, element("h2", {}, "Traces"),
    note("Open a timeline at ui.perfetto.dev, and the profile directory with xprof or TensorBoard "
      + "(tensorboard --logdir=DIR)."),
    element("ul", {}, addresses.map((address) =>
      element("li", {}, element("a", { href: address }, decodeURIComponent(address))))));
}
