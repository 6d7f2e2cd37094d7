// A base model's view: one document that the person and the model write in turn.

import { turner } from "./branches.js";
import { $, element } from "./dom.js";
import { textOf } from "./store.js";
import { cut, fill, picked, shown } from "./thoughts.js";

export const path = "v1/completions";
export const thoughts = { logprobs: 5 };

/** A textarea is edited and read aloud; the same text lies behind it in colours that tell whose words are whose. */
export function draw({ messages }, busy, act) {
  const text = textOf(messages);
  if ($("document").value !== text) $("document").value = text;
  $("document").readOnly = busy;
  paintAll(messages, busy, act);
  const last = messages.at(-1);
  const takes = messages.some((part) => part.take);
  $("undo").disabled = busy || !takes;
  $("again").disabled = busy || !last?.take;
  $("told").textContent = [last?.note, last?.told].filter(Boolean).join(" ");
}

function paintAll(parts, busy, act) {
  const nodes = parts.flatMap((part, i) => {
    // Only where there are tokens to visit it is more than the textarea's colours.
    const ariaHidden = shown(part) ? null : "true";
    const span = element("span", { className: part.role === "user" ? "" : "model", ariaHidden });
    fill(span, part);
    return [turner(parts, i, busy, act.turn), span].filter(Boolean);
  });
  // A last line that is empty has no height of its own.
  $("backdrop").replaceChildren(...nodes, "\u200b");
  for (const branches of $("backdrop").querySelectorAll(".ways")) {
    const beyond = branches.offsetLeft + branches.offsetWidth - $("backdrop").clientWidth;
    if (beyond > 0) branches.style.marginLeft = `${-beyond}px`;
  }
}

/** The streamed text so far; the textarea follows at the end. */
export function paint(message) {
  fill($("backdrop").lastElementChild, message);
}

/** Puts the cursor into a part's text. */
export function edit(parts, part, place) {
  place += textOf(parts.slice(0, parts.indexOf(part))).length;
  $("document").focus();
  $("document").setSelectionRange(place, place);
}

/** The parts after an edit: what was typed is the person's, the rest stays whose it was, and so do branches. */
export function edited(parts, text) {
  const old = textOf(parts);
  const shorter = Math.min(old.length, text.length);
  let start = 0;
  while (start < shorter && old[start] === text[start]) start++;
  let end = 0;
  while (end < shorter - start && old.at(-1 - end) === text.at(-1 - end)) end++;
  const typed = { role: "user", content: text.slice(start, text.length - end) };
  const behind = slice(parts, old.length - end, Infinity);
  // Words at a branching place, and in place of one that was deleted, belong to the branch that is shown.
  const deleted = slice(parts, start, old.length - end).find((part) => part.branch);
  const parting = deleted ?? (typed.content ? behind[0] : null);
  if (parting?.branch) typed.branch = parting.branch;
  if (parting === behind[0]) delete parting?.branch;
  const joined = [];
  for (const piece of [...slice(parts, 0, start), typed, ...behind].filter(present)) {
    const before = joined.at(-1);
    if (before && before.take === piece.take && !piece.branch) {
      before.content += piece.content;
      before.tokens &&= [...before.tokens, ...piece.tokens];
    } else joined.push(piece);
  }
  return joined;
}

/** A part without words stays where a branch begins with it. */
const present = ({ content, branch }) => content || branch;

function slice(parts, from, to) {
  let at = 0;
  const cuts = parts.map(({ branch, ...part }) => {
    const [first, last] = [Math.max(0, from - at), Math.max(0, to - at)];
    const piece = { ...part, content: part.content.slice(first, last), tokens: cut(part.tokens, first, last) };
    if (branch && from <= at && at < to) piece.branch = branch;
    at += part.content.length;
    return piece;
  });
  return cuts.filter(present);
}

/** The model's last words, and corrections among them: where they begin, and where they end. */
function lastTake(parts) {
  const take = Math.max(...parts.map((part) => part.take ?? 0));
  const first = parts.findIndex((part) => part.take === take);
  const branching = parts.findLastIndex((part) => part.take === take && part.branch);
  return [Math.max(first, branching), parts.findLastIndex((part) => part.take === take) + 1];
}

/** The parts without the model's last words; what follows is kept, and so are the branches. */
export function rewound(parts) {
  const [first, end] = lastTake(parts);
  const places = parts.slice(first, end).filter((part) => part.branch);
  const emptied = places.map(({ branch }) => ({ role: "user", content: "", branch }));
  return [...parts.slice(0, first), ...emptied, ...parts.slice(end)];
}

/** [what stays, the beginning of the next words, what stood there]: to go on at the end. */
export function onward(parts) {
  const end = parts.findLastIndex((part) => part.content) + 1;
  return [parts.slice(0, end), {}, parts.slice(end)];
}

/** The same for other last words. */
export function again(parts) {
  const [first] = lastTake(parts);
  const [before, , emptied] = onward(parts.slice(0, first));
  return [before, picked(parts[first]), [...emptied, ...parts.slice(first)]];
}

/** The same for other words from a place in the i-th part on. */
export function parted(parts, i, place) {
  place += textOf(parts.slice(0, i)).length;
  return [slice(parts, 0, place), { content: "", tokens: [] }, slice(parts, place, Infinity)];
}

/** [request, what was left out]: ever shorter ends of the text, the last message and how it begins included.

 `room`: about how many characters leave space for `length` tokens more. What fits at all, the server says.
 */
export function* attempts({ messages }, length, room) {
  // A space at the end belongs to the model's next word.
  const text = textOf(messages).replace(/ +$/, "");
  for (let size = Math.min(room, text.length); ; size *= 0.75) {
    const prompt = size < text.length ? text.slice(-Math.ceil(size)).replace(/^\S*\s+(?=\S)/, "") : text;
    const note = prompt === text ? "" : `The model read the last ${prompt.length.toLocaleString()} characters.`;
    yield [{ prompt, max_tokens: length }, note];
    if (size < 8) return;
  }
}
