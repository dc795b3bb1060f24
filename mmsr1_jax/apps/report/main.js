// Fills the page. Its address selects the view: #overview, #episodes, #episode-12.

const summary = JSON.parse(document.getElementById("summary").textContent);
const charts = JSON.parse(document.getElementById("charts").textContent);

function show(view) {
  for (const name of ["overview", "episodes"]) {
    document.getElementById(name).hidden = name !== view;
    const link = document.getElementById(`to-${name}`);
    if (name === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.className = view;
  if (view === "episodes") renderRows();
}

function follow() {
  const episode = location.hash.match(/^#episode-(\d+)$/);
  if (episode) {
    show("episodes");
    const position = browser.matching.indexOf(Number(episode[1]) - 1);
    select(position < 0 ? browser.position : position);
  } else if (location.hash === "#episodes") {
    show("episodes");
    select(browser.position);
  } else if (location.hash !== "#content") {
    show(summary.curves.steps || summary.results || !summary.rows.length ? "overview" : "episodes");
  }
}

const MOVES = { j: 1, k: -1 };
const LIST_MOVES = {
  ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.getElementById("episodes").hidden) return;
  const list = document.getElementById("list");
  if (event.key === "Escape") return list.focus();
  if (event.target.closest("input, select, textarea")) return;
  const inList = event.target === list || event.target === document.body;
  const moves = { ...MOVES, ...(inList ? LIST_MOVES : {}) };
  if (event.key === "/") document.getElementById("text").focus();
  else if (event.key in moves) select(browser.position + moves[event.key]);
  else return;
  event.preventDefault();
}

document.getElementById("name").textContent = summary.name;
document.getElementById("about").textContent = [
  summary.curves.steps ? `${summary.curves.steps.at(-1)} steps` : "",
  summary.rows.length ? `${summary.rows.length} episodes` : "",
].filter(Boolean).join(" · ");
document.getElementById("overview").append(...overviewOf(summary, charts));
fillBrowser(summary.rows);
document.addEventListener("keydown", onKey);
addEventListener("hashchange", follow);
follow();
performance.mark("ready");
