// Conversations and settings, kept in this browser alone. A story is a conversation whose messages are one text.

const CONVERSATION = "gpt.conversation.";
const SETTINGS = "gpt.settings";
const conversations = new Map();

// A browser may keep nothing at all, and says so by throwing.
function attempt(work, otherwise) {
  try {
    return work();
  } catch {
    return otherwise;
  }
}

/** Reads again what is stored: at the start, and when another tab has written. */
export function load() {
  conversations.clear();
  for (const [key, value] of attempt(() => Object.entries(localStorage), [])) {
    const conversation = key.startsWith(CONVERSATION) && attempt(() => JSON.parse(value));
    if (conversation) conversations.set(conversation.id, conversation);
  }
}

/** What this tab remembers until it is closed: read, or written where a value is given. */
export function tab(key, value) {
  if (value !== undefined) attempt(() => sessionStorage.setItem(key, value));
  return attempt(() => sessionStorage.getItem(key)) ?? "";
}

export function create(kind, system = "") {
  // randomUUID is missing where a phone reaches the server over plain http.
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, kind, title: "", updated: 0, system, messages: [] };
}

/** Latest first. */
export function all(kind) {
  const kept = [...conversations.values()].filter((conversation) => conversation.kind === kind);
  return kept.sort((a, b) => b.updated - a.updated);
}

/** Whether the browser keeps it: its storage may be full or shut. */
export function save(conversation) {
  if (conversation.deleted) return true; // an answer that was under way has ended
  conversation.updated = Date.now();
  conversations.set(conversation.id, conversation);
  // What the model thought takes most of the room. Where there is none left, it goes: of the oldest first, its own last.
  const oldest = [...conversations.values()].sort((a, b) => a.updated - b.updated);
  let kept = put(CONVERSATION + conversation.id, conversation);
  for (const one of kept ? [] : oldest) {
    const lean = put(CONVERSATION + one.id, one, (name, value) => (name === "tokens" ? undefined : value));
    if (put(CONVERSATION + conversation.id, conversation)) return true;
    kept = lean && one === conversation;
  }
  return kept;
}

const put = (key, value, replace) =>
  attempt(() => (localStorage.setItem(key, JSON.stringify(value, replace)), true), false);

export function remove(conversation) {
  conversation.deleted = true;
  conversations.delete(conversation.id);
  attempt(() => localStorage.removeItem(CONVERSATION + conversation.id));
}

export const saveSettings = (settings) => put(SETTINGS, settings);
export const loadSettings = () => attempt(() => JSON.parse(localStorage.getItem(SETTINGS)));

export const textOf = (messages) => messages.map((message) => message.content).join("");

export function titleOf({ kind, title, messages }) {
  const words = textOf(kind === "chat" ? messages.slice(0, 1) : messages).trim().split(/\s+/).join(" ");
  return title || (words.length > 72 ? words.slice(0, 71) + "…" : words);
}

/** The same shape as the API's messages, and as finetuning data; `branches` are other messages in whole. */
export function asJson(conversation, branches) {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const bare = (messages) => [...system, ...messages.map(({ role, content }) => ({ role, content }))];
  const [messages, ...others] = [conversation.messages, ...branches].map(bare);
  const content = { title: titleOf(conversation), kind: conversation.kind, messages };
  return JSON.stringify({ ...content, ...(others.length && { branches: others }) }, null, 2) + "\n";
}

export function asMarkdown(conversation) {
  const { kind, system, messages } = conversation;
  const named = (name, text) => `**${name}**\n\n${text}`;
  const turns = messages.map(({ role, content }) => named(role === "user" ? "You" : "Model", content));
  const body = kind === "story" ? [textOf(messages)] : [...(system ? [named("System", system)] : []), ...turns];
  return [`# ${titleOf(conversation)}`, ...body].join("\n\n") + "\n";
}
