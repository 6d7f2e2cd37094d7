// A base model's view: one document that the person and the model write in turn.

import { $, element } from "./dom.js";
import { textOf } from "./store.js";

export const path = "v1/completions";

/** A textarea is edited and read aloud; the same text lies behind it in colours that tell whose words are whose. */
export function draw({ messages }, busy) {
  const text = textOf(messages);
  if ($("document").value !== text) $("document").value = text;
  $("document").readOnly = busy;
  paintAll(messages);
  const last = messages.at(-1);
  const takes = messages.some((part) => part.take);
  $("undo").disabled = busy || !takes;
  $("again").disabled = busy || !last?.take;
  $("told").textContent = [last?.note, last?.told].filter(Boolean).join(" ");
}

function paintAll(parts) {
  const spans = parts.map(({ role, content }) => element("span", { className: role === "user" ? "" : "model" }, content));
  // A last line that is empty has no height of its own.
  $("backdrop").replaceChildren(...spans, "\u200b");
}

/** The streamed text so far; the textarea follows at the end. */
export function paint(message) {
  $("backdrop").lastElementChild.textContent = message.content;
}

/** The parts after an edit: what was typed is the person's, the rest stays whose it was. */
export function edited(parts, text) {
  const old = textOf(parts);
  const shorter = Math.min(old.length, text.length);
  let start = 0;
  while (start < shorter && old[start] === text[start]) start++;
  let end = 0;
  while (end < shorter - start && old.at(-1 - end) === text.at(-1 - end)) end++;
  const typed = { role: "user", content: text.slice(start, text.length - end) };
  const pieces = [...slice(parts, 0, start), typed, ...slice(parts, old.length - end, old.length)];
  const joined = [];
  for (const piece of pieces.filter((piece) => piece.content)) {
    const before = joined.at(-1);
    if (before && before.take === piece.take) before.content += piece.content;
    else joined.push(piece);
  }
  return joined;
}

function slice(parts, from, to) {
  let at = 0;
  return parts.map((part) => {
    const content = part.content.slice(Math.max(0, from - at), Math.max(0, to - at));
    at += part.content.length;
    return { ...part, content };
  });
}

/** The parts without the model's last words, and without corrections among them; what follows is kept. */
export function rewound(parts) {
  const take = Math.max(...parts.map((part) => part.take ?? 0));
  const first = parts.findIndex((part) => part.take === take);
  const last = parts.findLastIndex((part) => part.take === take);
  return [...parts.slice(0, first), ...parts.slice(last + 1)];
}

/** [request, what was left out]: ever shorter ends of the text before the last message, still empty.

 `room`: about how many characters leave space for `length` tokens more. What fits at all, the server says.
 */
export function* attempts({ messages }, length, room) {
  // A space at the end belongs to the model's next word.
  const text = textOf(messages.slice(0, -1)).replace(/ +$/, "");
  for (let size = Math.min(room, text.length); ; size *= 0.75) {
    const prompt = size < text.length ? text.slice(-Math.ceil(size)).replace(/^\S*\s+(?=\S)/, "") : text;
    const note = prompt === text ? "" : `The model read the last ${prompt.length.toLocaleString()} characters.`;
    yield [{ prompt, max_tokens: length }, note];
    if (size < 8) return;
  }
}
