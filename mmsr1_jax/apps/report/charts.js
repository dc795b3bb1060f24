// Curves over the steps of a run, as SVG.

const WIDTH = 460, HEIGHT = 210, LEFT = 44, RIGHT = 10, TOP = 10, BOTTOM = 26;
const SMOOTH = 25; // a thick curve's points are means over a 25th of the run

// Round numbers that cover a range.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 5, 10].find((factor) => factor * size >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.floor(high / step + 0.999);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

// Means of the last `width` values there are, null where there are none.
function trailing(values, width) {
  return values.map((value, i) => {
    if (value === null) return null;
    const last = values.slice(Math.max(0, i + 1 - width), i + 1).filter((v) => v !== null);
    return last.reduce((a, b) => a + b, 0) / last.length;
  });
}

// A figure with a chart of `series`, [{name, values}], over `steps`; `stacked`: as areas.
function chart(title, steps, series, { stacked = false, least = 0 } = {}) {
  const tops = stacked ? stack(series.map((one) => one.values)) : series.map((one) => one.values);
  const all = tops.flat().filter((value) => value !== null);
  let low = least === null ? Math.min(...all) : Math.min(least, ...all);
  let high = Math.max(...all);
  if (high <= low) high = low + (Math.abs(low) || 1);
  const marks = ticks(low, high, 4);
  [low, high] = [marks[0], marks[marks.length - 1]];
  const [first, last] = [steps[0], steps[steps.length - 1]];
  const across = WIDTH - LEFT - RIGHT, up = HEIGHT - TOP - BOTTOM;
  const x = (step) => LEFT + (last > first ? (step - first) / (last - first) : 0.5) * across;
  const y = (value) => TOP + up - ((value - low) / (high - low)) * up;
  const point = (step, value) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`;

  const path = (values) => {
    let text = "", drawing = false;
    values.forEach((value, i) => {
      if (value === null) return; // validation is not at every step: its points are joined
      text += `${drawing ? "L" : "M"}${point(steps[i], value)}`;
      drawing = true;
    });
    return text;
  };
  const shapes = [];
  if (stacked) {
    tops.forEach((top, i) => {
      const below = i ? tops[i - 1] : top.map(() => 0);
      const back = steps.map((step, k) => `L${point(step, below[k])}`).reverse().join("");
      shapes.push(drawn("path", { class: `area s${i % 8}`, d: `${path(top)}${back}Z` }));
    });
  } else {
    const width = Math.ceil(steps.length / SMOOTH);
    series.forEach(({ values }, i) => {
      const color = `s${i % 8}`;
      const there = steps.map((_, k) => k).filter((k) => values[k] !== null);
      const few = there.length < steps.length / 2 || there.length <= 12;
      const smooth = few ? values : trailing(values, width);
      if (smooth !== values && width > 1) {
        shapes.push(drawn("path", { class: `line faint ${color}`, d: path(values) }));
      }
      shapes.push(drawn("path", { class: `line ${color}`, d: path(smooth) }));
      if (!few) return;
      for (const k of there) {
        const place = { cx: x(steps[k]), cy: y(values[k]), r: 2.6 };
        shapes.push(drawn("circle", { class: `dot ${color}`, ...place }));
      }
    });
  }
  const cross = drawn("line", { class: "cross", y1: TOP, y2: TOP + up, visibility: "hidden" });
  const xs = ticks(first, last, 5)
    .filter((step) => step >= first && step <= last && Number.isInteger(step));
  const mark = (place, text, anchor) =>
    drawn("text", { class: "mark", "text-anchor": anchor, ...place }, text);
  const said = spoken(title, steps, series);
  const svg = drawn("svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": said },
    marks.map((value) => [
      drawn("line", { class: "grid", x1: LEFT, x2: LEFT + across, y1: y(value), y2: y(value) }),
      mark({ x: LEFT - 7, y: y(value) + 3.5 }, number(value, 6), "end"),
    ]),
    (xs.length ? xs : [first]).map((step) =>
      mark({ x: x(step), y: HEIGHT - 8 }, String(step), "middle")),
    shapes, cross);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    let near = 0;
    steps.forEach((step, i) => {
      if (Math.abs(x(step) - at) < Math.abs(x(steps[near]) - at)) near = i;
    });
    for (const end of ["x1", "x2"]) cross.setAttribute(end, x(steps[near]));
    cross.setAttribute("visibility", "visible");
    const lines = series.filter((one) => one.values[near] !== null)
      .map((one) => `${one.name}: ${number(one.values[near])}`);
    tip.show([`step ${steps[near]}`, ...lines], event);
  });
  svg.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    tip.hide();
  });
  return element("figure", { class: "chart" },
    element("figcaption", {}, title),
    svg,
    element("ul", { class: "legend" }, series.map((one, i) =>
      element("li", {}, element("i", { class: `s${i % 8}`, "aria-hidden": "true" }), one.name))),
    folded("Values as a table", () => valuesTable(title, steps, series)));
}

function stack(columns) {
  const sums = columns[0].map(() => 0);
  return columns.map((values) => values.map((value, i) => (sums[i] += value ?? 0)));
}

function spoken(title, steps, series) {
  const ends = series.map(({ name, values }) => {
    const there = values.filter((value) => value !== null);
    return `${name} from ${number(there[0])} to ${number(there[there.length - 1])}`;
  });
  return `${title}, steps ${steps[0]} to ${steps[steps.length - 1]}: ${ends.join("; ")}.`;
}

function valuesTable(title, steps, series) {
  return table(title, ["step", ...series.map((one) => one.name)],
    steps.map((step, i) => [String(step), ...series.map((one) => number(one.values[i], 4))]));
}
