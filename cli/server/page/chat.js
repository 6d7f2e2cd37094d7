// A chat model's view: turns, each with what can be done to it.

import { turner } from "./branches.js";
import { $, element } from "./dom.js";
import { textOf } from "./store.js";
import { cut, fill, picked } from "./thoughts.js";

export const path = "v1/chat/completions";
export const thoughts = { logprobs: true, top_logprobs: 5 };

const button = (name, onclick) => element("button", { type: "button", className: "link", onclick }, name);

export function draw(conversation, busy, act) {
  const { system, messages } = conversation;
  const turns = messages.map((message, i) => turn(message, turner(messages, i, busy, act.turn), i === messages.length - 1, busy, act));
  const preface = system && element("p", { className: "system" }, system);
  const welcome = !messages.length && element("p", { className: "welcome" }, "What shall we talk about?");
  $("messages").replaceChildren(...[preface, welcome, ...turns].filter(Boolean));
}

function turn(message, branches, last, busy, act) {
  const person = message.role === "user";
  const live = busy && last;
  const text = element("div", { className: "text", ariaBusy: live ? "true" : "false" });
  fill(text, message);
  const foot = element(
    "div",
    { className: "foot" },
    branches,
    message.note && element("span", { className: "note" }, message.note),
    message.told && element("span", {}, message.told),
    // The clipboard is closed to pages that came over plain http.
    navigator.clipboard && !person && !live && button("Copy", () => navigator.clipboard.writeText(message.content)),
    !busy && person && button("Edit", () => edit(node, message, act)),
    !busy && last && button("Again", act.again),
  );
  const who = element("h2", { className: "unseen" }, person ? "You" : "Model");
  const className = `${person ? "person" : "model"} ${live ? "live" : ""}`;
  const node = element("article", { className }, who, text, foot);
  return node;
}

function edit(node, message, act) {
  const box = element("textarea", { value: message.content, ariaLabel: "Edit the message" });
  const send = () => box.value.trim() && act.resend(message, box.value.trim());
  box.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), send();
    if (event.key === "Escape") act.draw();
  };
  const hint = element("span", {}, "What came after is kept as another branch.");
  const foot = element("div", { className: "foot" }, hint, button("Cancel", act.draw), button("Send", send));
  node.classList.add("editing");
  node.replaceChildren(box, foot);
  box.focus();
}

/** The streamed answer so far. */
export function paint(message) {
  fill($("messages").lastElementChild.querySelector(".text"), message);
}

/** [what stays, the beginning of the answer, what stood there]: for another last answer. */
export function again(messages) {
  const last = messages.at(-1);
  return last.role === "assistant" ? [messages.slice(0, -1), picked(last), [last]] : [messages];
}

/** The same for another answer in place of the i-th message, from a place in its text on. */
export function parted(messages, i, place) {
  const { content, tokens } = messages[i];
  const start = { content: content.slice(0, place), tokens: cut(tokens, 0, place) };
  return [messages.slice(0, i), start, messages.slice(i)];
}

/** [request, what was left out] from all turns down to the last question: for the last message, which may have begun.

 `room`: about how many characters leave space for an answer. What fits at all, the server says.
 */
export function* attempts(conversation, length, room) {
  const { system, messages } = conversation;
  const head = system ? [{ role: "system", content: system }] : [];
  const turns = messages.slice(0, -1).map(({ role, content }) => ({ role, content }));
  const last = turns.findLastIndex((turn) => turn.role === "user");
  // A space at the end belongs to the model's next word.
  const content = messages.at(-1).content.replace(/ +$/, "");
  const onward = content && { continue_final_message: true, add_generation_prompt: false };
  if (content) turns.push({ role: "assistant", content });
  for (let first = Math.min(conversation.first ?? 0, last); first <= last; first++) {
    const kept = [...head, ...turns.slice(first)];
    if (turns[first].role !== "user" || (first < last && textOf(kept).length > room)) continue;
    conversation.first = first; // what did not fit now will not fit the next time
    const note = first ? `The ${first} oldest messages no longer fit and were left out.` : "";
    yield [{ messages: kept, max_tokens: length, ...onward }, note];
  }
}
