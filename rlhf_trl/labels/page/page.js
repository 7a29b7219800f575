// Keys of the labeling page. A form is sent in the background, again and again until the server has it: the server
// saves an answer once, however often it arrives. Then the new question takes the place of the old one.
"use strict";

const RETRY_MS = 1000;
let shown = performance.now();
let busy = false;

const one = (selector) => document.querySelector(selector);
const all = (selector) => Array.from(document.querySelectorAll(selector));
const isText = (element) => element && (element.matches("textarea") || element.matches("input:not([type=radio])"));

function say(text) {
  const status = one("#status");
  if (status) status.textContent = text;
}

async function send(form, submitter) {
  if (busy) return;
  busy = true;
  const seconds = form.querySelector("[name=seconds]");
  if (seconds) seconds.value = ((performance.now() - shown) / 1000).toFixed(2);
  const body = new URLSearchParams(new FormData(form));
  if (submitter && submitter.name) body.set(submitter.name, submitter.value);
  document.body.setAttribute("aria-busy", "true");
  try {
    for (;;) {
      const response = await fetch(form.action, { method: "POST", body }).catch(() => null);
      if (response && response.status === 401) {
        say("The server has another token now. Open the link that the terminal shows: this answer isn't saved.");
        return;
      }
      if (response && (response.ok || response.status === 422 || response.status === 507)) {
        await show(response, form);
        return;
      }
      say("The server doesn't answer. Your answer is kept here, and sent again until it is saved.");
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

async function show(response, form) {
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  if (!response.ok) {
    // What was chosen or typed stays; only the problem is new
    one(".problem")?.remove();
    const problem = page.querySelector(".problem");
    if (problem) one("#status").after(problem);
    return;
  }
  const edited = form.id.startsWith("edit");
  const kept = edited ? all("#answer input:checked").map((input) => [input.name, input.value]) : [];
  one("main").replaceWith(document.adoptNode(page.querySelector("main")));
  document.title = page.title;
  history.replaceState(null, "", response.url.replace(/[?&]note=\w+/, ""));
  for (const [name, value] of kept) choose(name, value);
  if (!edited) begin();
}

function begin() {
  shown = performance.now();
  window.scrollTo(0, 0);
  one("main").focus({ preventScroll: true });
  mark(groups()[0]);
}

// ---- Ranks and ratings: one line is marked, and digits are for it ----

const groups = () => all("#answer [data-group]");

function marked() {
  const holder = document.activeElement?.closest("[data-group]");
  return holder || one("#answer [data-group].marked");
}

function mark(group) {
  all(".marked").forEach((each) => each.classList.remove("marked"));
  if (!group) return;
  group.classList.add("marked");
  group.closest("article").classList.add("marked");
  (group.querySelector("input:checked") || group.querySelector("input")).focus({ preventScroll: true });
  group.closest("article").scrollIntoView({ block: "nearest" });
  group.scrollIntoView({ block: "nearest" });
}

function choose(name, value) {
  const input = all("#answer input").find((each) => each.name === name && each.value === value);
  if (input) input.checked = true;
  return input;
}

function pick(value) {
  const input = choose("choice", value);
  input?.focus({ preventScroll: true }); // so that a screen reader says it
  return Boolean(input);
}

function rate(digit) {
  const group = marked() || groups()[0];
  const input = group && Array.from(group.querySelectorAll("input")).find((each) => each.value === digit);
  if (!input) return false;
  input.checked = true;
  const list = groups();
  mark(list[list.indexOf(group) + 1] || group);
  return true;
}

function move(step) {
  const list = groups();
  const next = list[list.indexOf(marked()) + step];
  if (next) mark(next);
}

// ---- Keys ----

function open(details, target) {
  if (!details) return;
  details.open = !details.open;
  (details.open ? details.querySelector(target) : one("main"))?.focus();
}

function edit() {
  const choice = { 1: 0, 2: 1 }[one("#answer [name=choice]:checked")?.value];
  const list = all("article");
  const current = list.indexOf(document.activeElement?.closest("article"));
  const place = choice ?? (current >= 0 ? current : 0);
  const text = one("#text") || list[place]?.querySelector(".edit textarea");
  if (!text) return;
  const details = text.closest("details");
  if (details) details.open = true;
  text.focus();
}

function confidence() {
  const list = all("[name=confidence]");
  if (list.length) list[(list.findIndex((input) => input.checked) + 1) % list.length].checked = true;
}

function key(event) {
  const target = document.activeElement;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && target?.form) {
    event.preventDefault();
    target.form.requestSubmit();
    return;
  }
  if (event.key === "Escape") {
    all("details[open]:not(.guidelines)").forEach((details) => (details.open = false));
    one("main").focus();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || isText(target)) return;
  const form = one("#answer");
  const skip = one("#skip");
  const digit = /^[0-9]$/.test(event.key) ? event.key : null;
  let used = true;
  if (digit && skip?.open) skip.querySelectorAll(".reasons button")[Number(digit) - 1]?.click();
  else if (digit && form?.dataset.form === "pair") used = pick(digit);
  else if (digit && form) used = rate(digit);
  else if (event.key === "b" && form) used = pick("both_bad");
  else if (event.key === "Enter" && form && !target?.matches("button, a, summary")) form.requestSubmit(one("#submit"));
  else if (event.key === "Backspace") one("#undo")?.requestSubmit();
  else if (event.key === "ArrowDown" && groups().length) move(1);
  else if (event.key === "ArrowUp" && groups().length) move(-1);
  else if (event.key === "s") open(skip, "button");
  else if (event.key === "e") edit();
  else if (event.key === "c") confidence();
  else if (event.key === "g") open(one("#guidelines"), "summary");
  else if (event.key === "?") open(one("#help"), "summary");
  else used = false;
  if (used) event.preventDefault();
}

document.addEventListener("keydown", key);
document.addEventListener("submit", (event) => {
  if (event.target.method !== "post") return;
  event.preventDefault();
  send(event.target, event.submitter);
});
document.addEventListener("focusin", (event) => {
  const group = event.target.closest?.("[data-group]");
  if (group && !group.classList.contains("marked")) mark(group);
});
begin();
