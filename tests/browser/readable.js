// What a person who cannot see, or sees little, needs of a page; a list of what is wrong.
(() => {
  const wrong = [], shown = (e) => e.getClientRects().length > 0;
  const named = (e) => (e.getAttribute("aria-label") || e.innerText || e.labels?.[0]?.innerText || e.alt || "").trim()
    || (e.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)?.innerText ?? "").join("");
  const tell = (what, e) => wrong.push(`${what}: ${e.outerHTML.slice(0, 90)}`);
  if (!document.documentElement.lang) wrong.push("no language");
  if (!document.title) wrong.push("no title");
  if (document.querySelectorAll("main").length !== 1) wrong.push("not one main");
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not one h1");
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  if (new Set(ids).size !== ids.length) wrong.push("an id twice");
  let level = 0;
  for (const e of document.querySelectorAll("h1, h2, h3, h4")) {
    if (Number(e.tagName[1]) > level + 1) tell("a heading's level is left out", e);
    level = Number(e.tagName[1]);
  }
  for (const e of document.querySelectorAll("a[href], button, input:not([type=hidden]), select, progress, [role=img], nav, [role=region]"))
    if (shown(e) && !named(e)) tell("no name", e);
  for (const e of document.querySelectorAll("img")) if (e.alt === "" && !e.closest("[role=img]")) tell("no description", e);
  for (const e of document.querySelectorAll("table")) if (!e.caption || !e.querySelector("th[scope]")) tell("no caption or headers", e);
  for (const e of document.querySelectorAll("[aria-labelledby]"))
    for (const id of e.getAttribute("aria-labelledby").split(" ")) if (!document.getElementById(id)) tell("labelled by nothing", e);
  for (const e of document.querySelectorAll("button, select, input:not([type=hidden]):not([type=checkbox])"))
    if (shown(e) && e.getBoundingClientRect().height < 24) tell("too small to touch", e);
  const parse = (c) => (c.match(/[\d.]+/g) || []).map(Number);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const paper = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length && (c.length < 4 || c[3] === 1)) return c; } return [255, 255, 255]; };
  for (const e of document.querySelectorAll("body *")) {
    if (!shown(e) || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const ink = parse(getComputedStyle(e).color);
    if (ink.length > 3 && ink[3] === 0) continue;
    const [a, b] = [light(ink), light(paper(e))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    if (ratio < 4.5 && !e.closest("svg, option, .skip")) tell(`contrast ${ratio.toFixed(2)}`, e);
  }
  const wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide) wrong.push(`the page is too wide for ${wide}`);
  return wrong;
})()
