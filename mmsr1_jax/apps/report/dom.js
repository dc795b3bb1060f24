// Construction of elements. External text only goes into text nodes.

// Creates an element. Attributes that are null, undefined or false are omitted; `on` has listeners.
function element(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.flat(3).filter((child) => (child ?? "") !== ""));
  return node;
}

// Splits a text into strings and links for its web addresses. Only http and https become links.
function linked(text) {
  const parts = [];
  let start = 0;
  for (const match of text.matchAll(/https?:\/\/[^\s<>"'`]+/g)) {
    const address = match[0].replace(/[.,;:!?)\]]+$/, "");
    const link = linkTo(address, address);
    if (link === null) continue;
    parts.push(text.slice(start, match.index), link);
    start = match.index + address.length;
  }
  return [...parts, text.slice(start)];
}

function linkTo(address, text) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  if (url.username || url.password) return null; // its user would look like the host
  return element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, text);
}

// Creates a table of texts or elements; numeric columns are aligned to the right.
function table(caption, head, rows, numeric = () => true) {
  const row = (values, kind, scope) => element("tr", {}, values.map((value, column) =>
    element(kind, { class: numeric(column) ? "number" : null, scope }, value)));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {},
      element("caption", { class: "hidden" }, caption),
      element("thead", {}, row(head, "th", "col")),
      element("tbody", {}, rows.map((values) => row(values, "td")))));
}

// Creates a closed `details` element, whose content `create` returns when it is first opened.
function folded(title, create, attributes) {
  const node = element("details", { ...attributes }, element("summary", {}, title));
  node.addEventListener("toggle", () => {
    if (node.open && node.childElementCount === 1) node.append(...[create()].flat());
  });
  return node;
}

function number(value, digits = 3) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 10 ** -digits) return value.toExponential(1);
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toFixed(Math.abs(value) >= 100 ? 1 : digits)));
}

function percent(value) {
  const known = typeof value === "number" && Number.isFinite(value);
  return known ? `${(100 * value).toFixed(1)} %` : "–";
}

// Tooltip next to the pointer.
const tip = {
  show(lines, event) {
    const node = document.getElementById("tip");
    node.replaceChildren(...lines.map((line) => element("div", {}, line)));
    node.hidden = false;
    const { width, height } = node.getBoundingClientRect();
    const { clientX, clientY } = event;
    const left = Math.min(clientX + 14, innerWidth - width - 8);
    const top = clientY + 18 + height > innerHeight ? clientY - height - 12 : clientY + 18;
    node.style.left = `${Math.max(8, left)}px`;
    node.style.top = `${Math.max(8, top)}px`;
  },
  hide() {
    document.getElementById("tip").hidden = true;
  },
};
