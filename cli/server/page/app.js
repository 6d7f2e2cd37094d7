// Ties the page together: which conversation is shown, what the model is asked, and what is kept.

import { fitting, pageInfo } from "./api.js";
import { beside, others, turned } from "./branches.js";
import * as chat from "./chat.js";
import { $, element } from "./dom.js";
import * as form from "./settings.js";
import { settings } from "./settings.js";
import * as store from "./store.js";
import * as story from "./story.js";
import * as thoughts from "./thoughts.js";

let info; // what the server says of its model
let view; // chat or story
let current;
let density = 4; // characters in a token, as the server last counted them
let running = null; // the AbortController of the answer that is streaming

// ---- what is shown

function draw() {
  view.draw(current, running !== null, { again, resend, draw, turn });
  const title = store.titleOf(current);
  document.body.classList.toggle("writing", running !== null);
  document.body.classList.toggle("thinking", settings.thoughts);
  $("thoughts").ariaPressed = String(settings.thoughts);
  $("title").value = title;
  $("title").placeholder = info.chat ? "New conversation" : "New story";
  document.title = title ? `${title} · gpt` : "gpt";
  for (const id of ["send", "continue"]) $(id).classList.toggle("stop", running !== null);
  $("send").ariaLabel = running ? "Stop" : "Send";
  $("continue").textContent = running ? "Stop" : "Continue";
  drawList();
}

function drawList() {
  const items = store.all(current.kind).map((one) => {
    const open = element("button", { type: "button", onclick: () => show(one) }, store.titleOf(one) || "Untitled");
    if (one.id === current.id) open.ariaCurrent = "true";
    return element("li", {}, open);
  });
  $("list").replaceChildren(...items);
}

function show(conversation) {
  running?.abort();
  current = conversation;
  store.tab("gpt.current", current.id);
  for (const panel of document.querySelectorAll(":popover-open")) panel.hidePopover();
  $("system").value = current.system;
  dismiss();
  draw();
  bottom();
  $(info.chat ? "draft" : "document").focus();
}

const begin = () => show(current.messages.length ? store.create(current.kind, current.system) : current);

function keep(conversation = current) {
  if (store.save(conversation)) return;
  notice("The browser's storage is full: this will be gone after a reload. Export or delete something.");
}

function notice(text, name = "", act = null) {
  const [words, button] = $("notice").children;
  words.textContent = text;
  button.textContent = name;
  button.onclick = () => (dismiss(), act());
  $("notice").hidden = false;
}

const dismiss = () => ($("notice").hidden = true);
const bottom = () => ($("thread").scrollTop = $("thread").scrollHeight);

/** A reader at the end of the text stays there while it grows. */
function following(work) {
  const { scrollTop, clientHeight, scrollHeight } = $("thread");
  work();
  if (scrollHeight - scrollTop - clientHeight < 80) bottom();
}

// ---- asking the model

/** Writes a message that begins with `start` behind `before`, and keeps `rest`, what stood there, as another branch.

 Where nothing comes, the conversation stays as it was. Returns the message.
 */
async function generate(before = current.messages, start = {}, rest = []) {
  const retry = () => generate(before, start, rest);
  if (info.key_required && !store.tab("gpt.key")) return unlock(retry);
  dismiss();
  const conversation = current;
  const former = conversation.messages;
  const take = 1 + Math.max(0, ...before.map((one) => one.take ?? 0));
  const message = beside(rest, { role: "assistant", content: "", note: "", take, ...start });
  if (settings.thoughts || start.tokens) message.tokens = [...(start.tokens ?? [])];
  const begun = message.content;
  conversation.messages = [...before, message];
  const spaced = (info.chat ? begun : store.textOf(conversation.messages)).endsWith(" ");
  const attempts = view.attempts(conversation, settings.length, (info.context - settings.length) * density);
  const controller = (running = new AbortController());
  const clock = { pieces: 0, asked: performance.now() };
  let frame = 0;
  const paint = () => ((frame = 0), current === conversation && following(() => view.paint(message)));
  draw();
  bottom();
  $("announce").textContent = "The model is writing.";
  try {
    const { temperature, top_p, seed } = settings;
    const asked = settings.thoughts && view.thoughts;
    const common = { model: info.model, temperature, top_p, ...(seed !== null && { seed }), ...asked };
    const answers = fitting(view.path, common, attempts, store.tab("gpt.key"), controller.signal);
    for await (const { chunk, note, request } of answers) {
      const [choice] = chunk.choices;
      let piece = choice?.delta?.content ?? choice?.text ?? "";
      message.note = note;
      if (piece && spaced && !clock.pieces) piece = piece.replace(/^ /, "");
      if (message.tokens) thoughts.record(message, piece, choice);
      if (piece) {
        clock.last = performance.now();
        clock.pieces++;
        message.content += piece;
        frame ||= requestAnimationFrame(paint);
      }
      if (choice?.finish_reason === "length") clock.long = info.chat;
      if (chunk.usage) clock.usage = chunk.usage;
      const sent = request.prompt ?? store.textOf(request.messages);
      if (chunk.usage && sent.length > 200) density = sent.length / chunk.usage.prompt_tokens;
    }
    if (clock.long) message.note += " Cut at the length limit.";
    // A seed may give the same words again, which are no other branch.
    if (rest.length === 1 && rest[0].content === message.content) message.branch = rest[0].branch;
    if (message.content === begun) notice("The model has nothing to add.");
    clock.done = true;
  } catch (error) {
    if (controller.signal.aborted) message.note += " Stopped.";
    else if (message.content !== begun) message.note += ` ${error.message}`;
    else failed(error, retry);
  } finally {
    cancelAnimationFrame(frame);
    if (running === controller) running = null;
    message.told = told(clock);
    message.tokens = thoughts.cut(message.tokens, 0, Infinity);
    if (!(clock.done ? message.content : clock.pieces)) conversation.messages = former;
    keep(conversation);
    $("announce").textContent = message.content;
    following(draw);
  }
  return message;
}

function failed(error, retry) {
  if (error.code === "key") store.tab("gpt.key", "");
  notice(error.message, "Try again", retry);
}

function unlock(then) {
  $("unlock").onclick = () => {
    store.tab("gpt.key", $("key").value.trim());
    $("locked").close();
    then();
  };
  $("locked").showModal();
}

/** Tokens and their speed; where the server could not say how many, the pieces that came are about as many.

 The time is from the request on: the pieces of a short answer may all come at once.
 */
function told({ pieces, usage, asked, last }) {
  if (!pieces) return "";
  const tokens = usage?.completion_tokens ?? pieces;
  const speed = (tokens * 1000) / Math.max(1, last - asked);
  const rate = ` · ${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`;
  const held = usage ? ` · context ${usage.total_tokens} of ${info.context}` : "";
  return `${usage ? "" : "about "}${tokens} tokens${rate}${held}`;
}

function send() {
  if (running) return running.abort();
  const content = $("draft").value.trim();
  if (!content) return;
  current.messages.push({ role: "user", content });
  setDraft("");
  keep();
  generate();
}

const onward = () => generate(...view.onward(current.messages));
const again = () => generate(...view.again(current.messages));

function resend(message, content) {
  const i = current.messages.indexOf(message);
  const asked = beside(current.messages.slice(i), { role: "user", content });
  change({ messages: [...current.messages.slice(0, i), asked], first: 0 });
  generate();
}

/** Goes on from a token that the person chose, or ends there where `name` is null. */
async function choose({ message, number, start: place }, name, share) {
  const { messages } = current;
  const [before, start, rest] = view.parted(messages, messages.indexOf(message), place);
  if (name === null) {
    const ended = beside(rest, { role: info.chat ? "assistant" : "user", content: "", ...start });
    return change({ messages: [...before, ended] });
  }
  const [, , , likeliest] = message.tokens[number];
  const text = store.textOf([...before, start]).endsWith(" ") ? name.replace(/^ /, "") : name;
  const own = likeliest.findIndex(([other]) => other === name);
  current.first = 0;
  start.content += text;
  start.tokens = [...start.tokens, [text.length, share, own, likeliest, true]];
  const written = await generate(before, start, rest);
  const chosen = thoughts.find(written, start.tokens.length - 1);
  if (chosen && document.activeElement === document.body) thoughts.enter(chosen);
}

/** Shows another branch from the i-th message on. */
function turn(i, step) {
  change({ messages: turned(current.messages, i, step), first: 0 });
  const buttons = [step, -step].map((way) => document.querySelector(`[data-turn="${i} ${way}"]`));
  buttons.find((button) => button && !button.disabled)?.focus();
}

// ---- what the person does

function setDraft(text) {
  $("draft").value = text;
  fitDraft();
}

function fitDraft() {
  store.tab("gpt.draft", $("draft").value);
  $("draft").style.height = "auto";
  $("draft").style.height = `${$("draft").scrollHeight}px`;
}

function download(format, text) {
  const name = store.titleOf(current).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation";
  const href = URL.createObjectURL(new Blob([text]));
  element("a", { href, download: `${name}.${format}` }).click();
  URL.revokeObjectURL(href);
  $("menu").hidePopover();
}

function discard() {
  const gone = current;
  store.remove(gone);
  show(store.create(gone.kind));
  const restore = () => {
    gone.deleted = false;
    store.save(gone);
    show(gone);
  };
  if (gone.messages.length) notice("Deleted.", "Bring it back", restore);
}

/** A change of what is shown: kept, unless there is nothing to keep yet. */
function change(changes) {
  Object.assign(current, changes);
  if (current.updated || current.messages.length) keep();
  draw();
}

function listen() {
  const press = (id, act) => ($(id).onclick = act);
  press("new", begin);
  press("send", send);
  press("continue", () => (running ? running.abort() : onward()));
  press("again", again);
  press("undo", () => change({ messages: story.rewound(current.messages) }));
  press("delete", discard);
  press("thoughts", () => {
    settings.thoughts = !settings.thoughts;
    store.saveSettings(settings);
    following(draw);
  });
  press("dismiss", dismiss);
  press("export-md", () => download("md", store.asMarkdown(current)));
  press("export-json", () => download("json", store.asJson(current, others(current.messages))));
  $("system").onchange = () => change({ system: $("system").value.trim() });
  $("title").onchange = () => change({ title: $("title").value.trim() });
  $("draft").oninput = fitDraft;
  $("document").oninput = () => change({ messages: story.edited(current.messages, $("document").value) });
  window.addEventListener("storage", () => (store.load(), drawList()));
  window.addEventListener("pagehide", () => running && keep());
  document.addEventListener("keydown", key);
  thoughts.listen({ choose, edit: ({ message, start }) => story.edit(current.messages, message, start) });
}

function key(event) {
  const control = event.ctrlKey || event.metaKey;
  const chosen = () => event.preventDefault();
  if (event.isComposing || !info) return;
  if (event.key === "Escape" && running && !document.querySelector(":popover-open, dialog[open]")) running.abort();
  else if (control && event.shiftKey && event.code === "KeyO") chosen(), begin();
  else if (event.key !== "Enter" || running) return;
  else if (event.target === $("draft") && !event.shiftKey) chosen(), send();
  else if (event.target === $("document") && control) chosen(), onward();
  else if (event.target === $("key")) chosen(), $("unlock").click();
}

async function start() {
  form.draw();
  try {
    info = await pageInfo();
  } catch (error) {
    return notice(error.message, "Try again", start);
  }
  const kind = info.chat ? "chat" : "story";
  view = info.chat ? chat : story;
  document.body.dataset.kind = kind;
  $("model").textContent = info.model;
  form.bound(info.context);
  store.load();
  const last = store.tab("gpt.current");
  const known = store.all(kind);
  const left = last ? known.find((one) => one.id === last) : known[0];
  show(left ?? store.create(kind));
  setDraft(store.tab("gpt.draft"));
}

listen();
form.listen();
start();
