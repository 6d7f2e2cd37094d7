// Other ways in which a text goes on. The first message behind a branching place carries them all in `branch`:
// {at, ways}, where ways[at] is null and stands for what is shown; each other one is all messages from there on.

import { element } from "./dom.js";

/** Words, or branches that have some: an undone text leaves none. */
const worthKeeping = (way) => way.some(({ content, branch }) => content || branch);

/** `message`, in the place of `former`, which stays as another way to go on. */
export function beside(former, message) {
  if (!former.length) return message;
  const [{ branch = { at: 0, ways: [null] }, ...first }, ...rest] = former;
  const kept = worthKeeping([first, ...rest]);
  const ways = kept ? [...branch.ways.with(branch.at, [first, ...rest]), null] : branch.ways;
  const at = kept ? ways.length - 1 : branch.at;
  if (ways.length > 1) message.branch = { at, ways };
  return message;
}

/** The messages with the next way (step 1), or the one before it (-1), from the i-th message on. */
export function turned(messages, i, step) {
  const { branch, ...first } = messages[i];
  const shown = [first, ...messages.slice(i + 1)];
  const next = branch.ways[branch.at + step];
  const ways = branch.ways.with(branch.at, shown).filter(worthKeeping);
  const at = ways.indexOf(next);
  const [head, ...rest] = next;
  return [...messages.slice(0, i), { ...head, ...(ways.length > 1 && { branch: { at, ways: ways.with(at, null) } }) }, ...rest];
}

/** Each conversation that is not shown, from its beginning. */
export function* others(messages) {
  for (const [i, { branch }] of messages.entries()) {
    for (const way of branch?.ways.filter(Boolean) ?? []) {
      for (const rest of [way, ...others(way)]) yield [...messages.slice(0, i), ...rest];
    }
  }
}

/** ‹ 2/3 › for the branching place before the i-th message, where there is one. */
export function turner(messages, i, busy, turn) {
  const { branch } = messages[i];
  if (!branch) return null;
  const { at, ways } = branch;
  const button = (text, ariaLabel, step) => {
    const disabled = busy || !(at + step in ways);
    const node = element("button", { type: "button", disabled, ariaLabel, onclick: () => turn(i, step) }, text);
    node.dataset.turn = `${i} ${step}`;
    return node;
  };
  const [back, on] = [button("‹", "Earlier branch", -1), button("›", "Later branch", 1)];
  return element("span", { className: "ways", role: "group", ariaLabel: "Branches" }, back, `${at + 1}/${ways.length}`, on);
}
