// What the model thought at each token. A message's `tokens` lie over its text like tiles: [length, share, own, likeliest,
// picked]. `length`: in characters, of text that is one token, or several where only together they make a character.
// `share`: its probability, missing where the model was not asked. `likeliest`: [name, share] of five; `own`: which of them
// stands here, or -1. `picked`: the person chose it. A name is a token's text, bytes:\x.. for a part of a character, or
// that of a special token.

import { $, element } from "./dom.js";
import { settings } from "./settings.js";

const END = /^<\|(end|endoftext)\|>$/;
// A part of a character, and any other special token: neither can be sent as text.
const OTHER = /^(bytes:(\\x[0-9a-f]{2})+|<\|\w+\|>)$/;
const STEPS = [0.9, 0.6, 0.3, 0.1, 0.02]; // of the background: style.css has the colours

const rounded = (share) => Number(share.toPrecision(3));
const lengthOf = (tokens) => tokens.reduce((sum, [length]) => sum + length, 0);

function percent(share) {
  if (share > 0.995) return "over 99%";
  return share < 0.0001 ? "under 0.01%" : `${Number((100 * share).toPrecision(share < 0.1 ? 1 : 2))}%`;
}

// ---- from the API

const nameOf = ({ token, bytes }) => (bytes && new TextEncoder().encode(token).length !== bytes.length ? `bytes:${token}` : token);

/** [name, log probability, [name, log probability] of the likeliest] of an event's tokens, of either endpoint. */
function read({ content, tokens, token_logprobs, top_logprobs }) {
  const entry = (one) => [nameOf(one), one.logprob];
  if (content) return content.map((one) => [...entry(one), one.top_logprobs.map(entry)]);
  const likeliest = (all) => Object.entries(all).sort((a, b) => b[1] - a[1]).slice(0, 5);
  return (tokens ?? []).map((name, i) => [name, token_logprobs[i], likeliest(top_logprobs[i])]);
}

/** Adds what an event tells, whose text is `piece`, to the message's tokens. */
export function record({ tokens }, piece, choice) {
  for (const [name, logprob, likeliest] of read(choice?.logprobs ?? {})) {
    const share = rounded(Math.exp(logprob));
    const shares = likeliest.map(([name, logprob]) => [name, rounded(Math.exp(logprob))]);
    const open = tokens.at(-1)?.[0] === 0 && tokens.at(-1); // a part of a character: its text comes with the last part
    if (open) open[1] = rounded(open[1] * share);
    else tokens.push([0, share, likeliest.findIndex(([other]) => other === name), shares]);
  }
  const last = tokens.at(-1);
  if (last?.[0] === 0) last[0] = piece.length;
  else if (piece) tokens.push([piece.length]);
}

/** The tokens of a stretch of the text; of those that it cuts only the text is left. */
export function cut(tokens, from, to) {
  let at = 0;
  const kept = tokens?.map((token) => {
    const begin = Math.max(from, at);
    at += token[0];
    const length = Math.min(to, at) - begin;
    return length === token[0] ? token : [length];
  });
  return kept?.filter(([length]) => length > 0);
}

/** The beginning of a message up to the token that the person chose last. */
export function picked({ content, tokens = [] }) {
  const kept = tokens.slice(0, tokens.findLastIndex(([, , , , picked]) => picked) + 1);
  return kept.length ? { content: content.slice(0, lengthOf(kept)), tokens: kept } : {};
}

// ---- on the page

export const shown = (message) => settings.thoughts && message.tokens;

/** Writes the message's text into its node. A token that stands there already is not drawn again. */
export function fill(node, message) {
  if (!shown(message)) return void (node.textContent = message.content);
  const { content, tokens } = message;
  const drawn = node.childElementCount;
  const fresh = tokens.slice(drawn).filter(([length]) => length);
  let start = content.length - lengthOf(fresh);
  const spans = fresh.map((token, i) => {
    const [length, share, , , picked] = token;
    const text = content.slice(start, start + length);
    const spot = { message, number: drawn + i, start, text };
    start += length;
    if (share === undefined) return element("span", {}, text);
    const step = STEPS.findIndex((least) => share >= least);
    const [space, word] = text.trim() ? [text.match(/^ */)[0], text.trimStart()] : ["", text];
    const className = `step-${step < 0 ? STEPS.length : step} ${picked ? "picked" : ""} ${/^\n+$/.test(text) ? "line" : ""}`;
    const tinted = element("span", { className }, word);
    return element("span", { className: "token", title: percent(share), spot }, space, tinted);
  });
  node.append(...spans);
  const first = node.querySelector(".token");
  if (first && !node.querySelector('[tabindex="0"]')) reachable(first);
}

/** Makes a token the one that the Tab key reaches, and says what it is. */
function reachable(span) {
  const { text, message, number } = span.spot;
  const ariaLabel = `${text.trim() || spelled(text)}, ${percent(message.tokens[number][1])}`;
  Object.assign(span, { tabIndex: 0, role: "button", ariaHasPopup: "dialog", ariaLabel });
}

/** Moves the focus to a token. */
export function enter(span) {
  for (const other of span.parentNode.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  reachable(span);
  span.focus();
}

const all = () => [...document.querySelectorAll("main .token[title]")];
export const find = (message, number) => all().find(({ spot }) => spot.message === message && spot.number === number);

/** The token so many further on, or none beyond the last. */
function neighbour(span, step) {
  const tokens = all();
  return tokens[tokens.indexOf(span) + step];
}

/** White space as signs that can be seen. */
const spelled = (text) => text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

let open = null; // the token whose alternatives are shown

function show(span, act) {
  if (document.body.classList.contains("writing")) return;
  const box = $("thought");
  if (box.matches(":popover-open")) box.hidePopover(); // which gives the focus back to the former token
  open = span;
  enter(span);
  const { message, number, text } = span.spot;
  const [, share, own, likeliest, picked] = message.tokens[number];
  const rows = likeliest.map(([name, share], i) => row(name, share, i === own, act));
  if (own < 0) rows.push(row(text, share, true, act));
  const others = 1 - likeliest.reduce((sum, [, share]) => sum + share, own < 0 ? share : 0);
  const rest = others > 0.0005 && element("p", { className: "rest" }, "all others", element("span", {}, percent(others)));
  const hint = element("p", { className: "hint" }, picked ? "You chose this one. " : "", "Choose, and the model goes on from there.");
  const edit = document.body.dataset.kind === "story" && element("button", { type: "button", className: "link", onclick: () => close(() => act.edit(span.spot)) }, "Edit here");
  box.replaceChildren(...[...rows, rest, hint, edit].filter(Boolean));
  box.showPopover();
  place();
  (box.querySelector("[aria-current]:enabled") ?? box.querySelector("button:enabled"))?.focus();
}

function row(name, share, here, act) {
  const end = END.test(name);
  const other = !end && OTHER.test(name);
  const bytes = (name) => name.replace("bytes:\\x", "part of a character: ").replaceAll("\\x", " ");
  const word = end ? "the end" : other ? bytes(name) : spelled(name);
  const bar = element("span", { className: "bar" });
  bar.style.width = `${100 * share}%`;
  const { spot } = open;
  const node = element(
    "button",
    {
      type: "button",
      className: end || other ? "choice name" : "choice",
      ariaCurrent: here ? "true" : null,
      // An answer that ends before it begins is none.
      disabled: other || (end && !spot.message.content.slice(0, spot.start)),
      onclick: () => close(() => act.choose(spot, end ? null : name, share)),
    },
    bar,
    element("span", {}, word),
    element("span", {}, percent(share)),
  );
  return node;
}

function close(then) {
  $("thought").hidePopover();
  then();
}

/** Below the token, or above it where there is no room. */
function place() {
  const box = $("thought");
  if (!box.matches(":popover-open")) return;
  const { left, top, bottom } = open.lastElementChild.getClientRects()[0]; // the word may begin on the line after its space
  const below = bottom + 6 + box.offsetHeight < innerHeight;
  box.style.left = `${Math.max(8, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${below ? bottom + 6 : Math.max(8, top - box.offsetHeight - 6)}px`;
}

/** act.choose(spot, name, share): a token was chosen, name null for the end; act.edit(spot): its text is to be edited. */
export function listen(act) {
  const onclick = ({ target }) => target.closest(".token") && show(target.closest(".token"), act);
  const onkeydown = (event) => {
    if (!event.target.spot) return;
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const span = step && neighbour(event.target, step);
    if (span) enter(span);
    if (event.key === "Enter" || event.key === " ") show(event.target, act);
    else if (!step) return;
    event.preventDefault();
  };
  for (const id of ["messages", "backdrop"]) Object.assign($(id), { onclick, onkeydown });
  $("thought").onkeydown = (event) => {
    const side = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const span = side && neighbour(open, side);
    if (span) show(span, act);
    const down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...$("thought").querySelectorAll("button:enabled")];
    if (down) buttons.at((buttons.indexOf(document.activeElement) + down) % buttons.length).focus();
    if (side || down) event.preventDefault();
  };
  $("thread").addEventListener("scroll", place);
  window.addEventListener("resize", place);
}
