// Shows one question at a time and collects decisions. They are kept in the browser, and saved to a
// file for `mmsr1 construct --reviews=..`.

const data = JSON.parse(document.getElementById("data").textContent);
const VERDICTS = { accept: "Accept", reject: "Reject", edit: "Edit" };
const state = { position: 0, decisions: {}, isEditing: false };

function storageKey() {
  return `mmsr1-review-${data.digest}-${reviewer()}`;
}

function reviewer() {
  return document.getElementById("reviewer").value.trim();
}

// A browser may refuse to store anything for a page opened from a file.
function remember() {
  try {
    localStorage.setItem(storageKey(), JSON.stringify(state.decisions));
  } catch {
    report("This browser keeps no decisions: save them before you close the page.");
  }
}

function recall() {
  try {
    setDecisions(JSON.parse(localStorage.getItem(storageKey()) || "{}"));
  } catch {
    setDecisions({});
  }
}

// Takes over decisions about the questions of this page that have the expected form.
function setDecisions(decisions) {
  state.decisions = {};
  for (const item of data.items) {
    const decision = Object.hasOwn(decisions ?? {}, item.id) ? decisions[item.id] : null;
    if (decision && Object.hasOwn(VERDICTS, decision.verdict)) {
      state.decisions[item.id] = {
        verdict: decision.verdict, question: String(decision.question ?? ""),
        answer: String(decision.answer ?? ""),
      };
    }
  }
  render();
}

function report(text) {
  document.getElementById("status").textContent = text;
}

function decide(verdict, question = "", answer = "") {
  const item = data.items[state.position];
  if (!item) return;
  state.decisions[item.id] = { verdict, question, answer };
  state.isEditing = false;
  remember();
  move(1);
}

function move(step) {
  state.isEditing = false;
  state.position = Math.max(0, Math.min(data.items.length - 1, state.position + step));
  render();
}

function moveToUndecided() {
  const count = data.items.length;
  for (let step = 1; step <= count; step += 1) {
    const position = (state.position + step) % count;
    if (!state.decisions[data.items[position].id]) {
      state.position = position;
      state.isEditing = false;
      return render();
    }
  }
  report("All questions are decided.");
}

function pair(name, value) {
  return value ? [element("dt", {}, name), element("dd", {}, linked(value))] : [];
}

function buttons(decision) {
  return element("div", { class: "bar" }, Object.entries(VERDICTS).map(([verdict, label]) =>
    element("button", {
      type: "button", class: verdict, id: verdict,
      "aria-pressed": String(decision?.verdict === verdict),
      on: { click: () => (verdict === "edit" ? edit() : decide(verdict)) },
    }, label)));
}

function edit() {
  state.isEditing = true;
  render();
  document.getElementById("question").focus();
}

function editor(item, decision) {
  const edited = decision?.verdict === "edit" ? decision : item;
  const question = element("textarea", { id: "question", rows: "3", maxlength: "2000" });
  const answer = element("input", { id: "answer", class: "wide", maxlength: "2000" });
  question.value = edited.question;
  answer.value = edited.answer;
  const save = () => {
    if (!question.value.trim() || !answer.value.trim()) {
      return report("An edit needs a question and an answer.");
    }
    decide("edit", question.value.trim(), answer.value.trim());
  };
  return element("form", { on: { submit: (event) => { event.preventDefault(); save(); },
    keydown: (event) => { if (event.ctrlKey && event.key === "Enter") save(); } } },
    element("label", {}, "Question", question), element("label", {}, "Answer", answer),
    element("div", { class: "bar" }, element("button", { type: "submit" }, "Save the edit")));
}

function render() {
  const item = data.items[state.position];
  const node = document.getElementById("item");
  const decided = Object.keys(state.decisions).length;
  report(`${decided} of ${data.items.length} decided`);
  if (!item) return node.replaceChildren(element("p", {}, "There are no questions."));
  const decision = state.decisions[item.id];
  const edited = decision?.verdict === "edit" ? decision : item;
  node.replaceChildren(element("div", { class: "item" },
    element("img", { src: item.image, alt: "Picture of the question" }),
    element("div", {},
      element("p", { class: "dim" }, `${state.position + 1} of ${data.items.length}`,
        decision ? element("span", { class: decision.verdict }, ` · ${decision.verdict}`) : null),
      state.isEditing ? editor(item, decision) : [
        element("p", { class: "question" }, edited.question),
        element("dl", {}, pair("Answer", edited.answer), pair("Also", item.aliases),
          pair("Shows", item.concept), pair("Evidence", item.evidence),
          pair("Calculation", item.calculation), pair("Page", item.url),
          pair("Picture", item.imageTitle), pair("Licence", item.licence),
          pair("Category", item.category))],
      buttons(decision))));
}

function save() {
  if (!reviewer()) return report("Enter your name first.");
  const text = JSON.stringify({ reviewer: reviewer(), decisions: state.decisions }, null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: address, download: `review-${reviewer().replace(/\W+/g, "_")}.json` }).click();
  URL.revokeObjectURL(address);
  return report("Saved. Give the file to `mmsr1 construct --reviews=FILE`.");
}

async function load(event) {
  const [file] = event.target.files;
  try {
    const saved = JSON.parse(await file.text());
    document.getElementById("reviewer").value = String(saved.reviewer ?? "").slice(0, 60);
    setDecisions(saved.decisions);
    remember();
  } catch {
    report("This file contains no decisions.");
  }
}

const KEYS = {
  a: () => decide("accept"), r: () => decide("reject"), e: edit,
  j: () => move(1), k: () => move(-1), u: moveToUndecided,
};

function onKey(event) {
  if (event.key === "Escape" && state.isEditing) {
    state.isEditing = false;
    return render();
  }
  const isTyping = ["INPUT", "TEXTAREA"].includes(event.target.tagName);
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return undefined;
  if (!Object.hasOwn(KEYS, event.key)) return undefined;
  event.preventDefault();
  return KEYS[event.key]();
}

document.addEventListener("keydown", onKey);
document.getElementById("save").addEventListener("click", save);
document.getElementById("load").addEventListener("change", load);
document.getElementById("reviewer").addEventListener("change", recall);
recall();
