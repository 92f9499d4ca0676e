// What a page does beyond its links and forms: keys, labels without a reload, and what is live. No page needs it to be read.
"use strict";

const KEYS = [
  ["j or →", "next task, or next in the list"],
  ["k or ←", "the one before"],
  ["Enter", "open the task that is marked in the list"],
  ["u", "back to the list"],
  ["/", "search for words"],
  ["1 to 9", "go to that chain"],
  ["r, w", "call the chain right or wrong; again takes it back"],
  ["?", "these keys"],
];

const find = (selector) => document.querySelector(selector);
const follow = (selector) => find(selector)?.click();
const say = (text) => { const place = find("#said"); if (place) place.textContent = text; };

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function showKeys() {
  let dialog = find("dialog");
  if (!dialog) {
    dialog = document.createElement("dialog");
    dialog.setAttribute("aria-label", "Keys");
    const list = document.createElement("dl");
    for (const [key, what] of KEYS) {
      const term = document.createElement("dt");
      term.append(element("kbd", key));
      list.append(term, element("dd", what));
    }
    const close = element("button", "Close");
    close.addEventListener("click", () => dialog.close());
    dialog.append(list, close);
    document.body.append(dialog);
  }
  dialog.showModal();
}

// Labels

async function label(button) {
  const { part, task } = find("#task").dataset;
  const { response, said, than } = button.dataset;
  const isBack = button.getAttribute("aria-pressed") === "true";
  const body = { part, task, response, said: isBack ? "none" : said };
  if (than) body.than = than;
  let answer;
  try {
    answer = await fetch("labels", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  } catch {
    say("The label is not kept: the viewer does not answer.");
    return;
  }
  if (!answer.ok) {
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    say(`The label is not kept: ${page.querySelector("[role=alert]")?.textContent ?? answer.statusText}`);
    return;
  }
  for (const one of button.closest(".says").querySelectorAll(".label")) {
    one.setAttribute("aria-pressed", String(one === button && !isBack));
  }
  say(isBack ? "The label is taken back." : `Kept: ${button.textContent.trim()}.`);
}

// The list: one row is marked

let at = -1;
function move(step) {
  const rows = [...document.querySelectorAll(".list tbody tr")];
  if (!rows.length) return false;
  const next = at + step;
  if (next < 0 || next >= rows.length) return false;
  rows[at]?.classList.remove("at");
  at = next;
  rows[at].classList.add("at");
  rows[at].querySelector("a").focus();
  rows[at].scrollIntoView({ block: "nearest" });
  return true;
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea, dialog")) return;
  const chain = document.activeElement?.closest?.(".chain");
  const actions = {
    j: () => move(1) || follow(".pages a[rel=next]"),
    k: () => move(-1) || follow(".pages a[rel=prev]"),
    ArrowRight: () => follow(".pages a[rel=next]"),
    ArrowLeft: () => follow(".pages a[rel=prev]"),
    u: () => follow("[data-up]"),
    "/": () => find("#f-text") ? find("#f-text").focus() : follow("[data-up]"),
    r: () => chain?.querySelector("[data-said=right]")?.click(),
    w: () => chain?.querySelector("[data-said=wrong]")?.click(),
    "?": showKeys,
  };
  if (/^[1-9]$/.test(event.key)) {
    const wanted = find(`#chain-${event.key}`);
    wanted?.focus();
    wanted?.scrollIntoView({ block: "nearest" });
  } else if (actions[event.key]) {
    event.preventDefault();
    actions[event.key]();
  }
}

// What is live

async function refresh(live) {
  if (document.hidden || live.contains(document.activeElement)) return;
  try {
    const answer = await fetch("live");
    if (!answer.ok) return;
    live.innerHTML = await answer.text(); // the viewer's own, with everything in it escaped
    if (live.dataset.until) {
      const page = await (await fetch("./")).text();
      if (!page.includes(`data-until="${live.dataset.until}"`)) location.reload();
    }
  } catch { /* the viewer was stopped: what is there stays */ }
}

document.addEventListener("keydown", press);
for (const button of document.querySelectorAll("button.label")) {
  button.hidden = false;
  button.addEventListener("click", () => label(button));
}
for (const button of document.querySelectorAll("[data-help]")) {
  button.hidden = false;
  button.addEventListener("click", showKeys);
}
for (const select of document.querySelectorAll("#filters select, #f-down")) {
  select.addEventListener("change", () => find("#filters").requestSubmit());
}
const live = find("#live");
if (live) setInterval(() => refresh(live), 1000 * Number(live.dataset.every));
