// What the models said at each checkpoint: two of them side by side.

import { askOr } from "./data.js";
import { letter } from "./charts.js";
import { $, element } from "./shared/dom.js";

const known = new Map(); // by run: how long its file was, and what it said
const chosen = [{ step: "first" }, { step: "newest" }];

export async function draw(runs) {
  const able = runs.filter((run) => run.samples);
  $("samples").hidden = !able.length;
  if (!able.length) return;
  for (const run of able) {
    if (known.get(run.id)?.size !== run.samples)
      known.set(run.id, { size: run.samples, said: await askOr(`samples/${run.id}`, []) });
  }
  // Unless something else is chosen: the first run's first and newest, or two runs where the first has but one.
  const second = able.length > 1 && known.get(able[0].id).said.length < 2 ? able[1] : able[0];
  const sides = chosen.map((side, i) => {
    const run = able.find(({ id }) => id === side.id) ?? (i ? second : able[0]);
    const { said } = known.get(run.id);
    const at = said.find(({ step }) => String(step) === side.step) ?? (side.step === "first" ? said[0] : said.at(-1));
    return { i, side, run, said, at };
  });
  const state = JSON.stringify([
    sides.map(({ side, run, said, at }) => [side, run.id, run.slot, said.length, at?.step]),
    able.map(({ id, slot }) => [id, slot]),
  ]);
  if ($("columns").dataset.state === state) return;
  $("columns").dataset.state = state;
  const again = (side, changes) => (Object.assign(side, changes), draw(runs));
  const option = (value, text, selected) => element("option", { value, selected }, text);
  const choosers = sides.map(({ i, side, run, said, at }) => {
    const which = able.map((each) => option(each.id, `${letter(each.slot)} ${each.name}`, each === run));
    const steps = [
      ["first", "first"],
      ["newest", "newest"],
      ...said.map(({ step }) => [String(step), `step ${step.toLocaleString("en")}`]),
    ];
    const when = steps.map(([value, text]) =>
      option(
        value,
        value === side.step && at
          ? `${text}${value === String(at.step) ? "" : `: step ${at.step.toLocaleString("en")}`}`
          : text,
        value === side.step,
      ),
    );
    return element(
      "div",
      { className: "chooser" },
      element(
        "select",
        {
          ariaLabel: `Run on the ${i ? "right" : "left"}`,
          onchange: ({ target }) =>
            again(side, { id: target.value, step: chosen[i].step.match(/\d/) ? "newest" : side.step }),
        },
        ...which,
      ),
      element(
        "select",
        {
          ariaLabel: `Checkpoint on the ${i ? "right" : "left"}`,
          onchange: ({ target }) => again(side, { step: target.value }),
        },
        ...when,
      ),
    );
  });
  const texts = sides.map(({ at }) => at?.texts ?? []);
  const rows = Array.from({ length: Math.max(...texts.map((each) => each.length)) }, (_, row) =>
    texts.map((each) => sample(each[row] ?? "")),
  );
  const focused = document.activeElement?.ariaLabel;
  $("columns").replaceChildren(...choosers, ...rows.flat());
  if (focused)
    $("columns")
      .querySelector(`[aria-label="${CSS.escape(focused)}"]`)
      ?.focus();
}

/** What was asked stands before the answer, behind a >. */
function sample(text) {
  const parts = /^> ([^]*?)\n\n([^]*)$/.exec(text);
  return element(
    "div",
    { className: "sample" },
    parts && element("span", { className: "asked" }, parts[1].trim()),
    parts ? parts[2] : text,
  );
}
