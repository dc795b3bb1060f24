// Making elements. Whatever comes from outside goes through text nodes only.

const SVG = "http://www.w3.org/2000/svg";

// An element. Attributes that are null, undefined or false are left out; `on` holds listeners.
function element(name, attributes, ...children) {
  const node = document.createElement(name);
  return filled(node, attributes, children);
}

function drawn(name, attributes, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
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

// Text with its web addresses as links. Only http and https lead anywhere.
function linked(text) {
  const parts = [];
  let begin = 0;
  for (const match of text.matchAll(/https?:\/\/[^\s<>"'`]+/g)) {
    const address = match[0].replace(/[.,;:!?)\]]+$/, "");
    const link = linkTo(address, address);
    if (link === null) continue;
    parts.push(text.slice(begin, match.index), link);
    begin = match.index + address.length;
  }
  return [...parts, text.slice(begin)];
}

function linkTo(address, text) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  if (url.username || url.password) return null; // the host is not what it begins with
  return element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, text);
}

// A table; cells are texts or elements, numbers stand to the right.
function table(caption, head, rows, numeric = () => true) {
  const row = (values, kind, scope) => element("tr", {}, values.map((value, column) =>
    element(kind, { class: numeric(column) ? "number" : null, scope }, value)));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {},
      element("caption", { class: "hidden" }, caption),
      element("thead", {}, row(head, "th", "col")),
      element("tbody", {}, rows.map((values) => row(values, "td")))));
}

// What opens on demand; `make` is called when it first does.
function folded(title, make, attributes) {
  const node = element("details", { ...attributes }, element("summary", {}, title));
  node.addEventListener("toggle", () => {
    if (node.open && node.childElementCount === 1) node.append(...[make()].flat());
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
  const there = typeof value === "number" && Number.isFinite(value);
  return there ? `${(100 * value).toFixed(1)} %` : "–";
}

// The note that follows the pointer.
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
