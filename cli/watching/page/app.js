// Ties the page together: which runs there are, which are shown, and how it keeps up with them.

import { ask, askOr, AskError, Columns } from "./data.js";
import { Chart, mark } from "./charts.js";
import * as samples from "./samples.js";
import { CHARTS, number, others, span } from "./specs.js";
import { $, element } from "./shared/dom.js";

const POLL = 2000,
  MOST = 30_000; // milliseconds
const AT_FIRST = 3; // so many runs are shown before anybody has chosen

const kept = (() => {
  try {
    return JSON.parse(localStorage.getItem("gpt.watch")) ?? {};
  } catch {
    return {};
  }
})();
const view = { over: "tokens", smoothing: 0.6, log: false, whole: false, ...kept.view, zoom: null };
const slots = new Map(); // the chosen runs, each with the number of its letter and colour
const columns = new Map();
const settings = new Map();
const charts = new Map();
const dark = matchMedia("(prefers-color-scheme: dark)");
let runs = [];
let chosen = kept.chosen; // by folder, the ids
let delay = POLL,
  busy = false,
  again = false,
  timer,
  since;

const whole = (value) => value.toLocaleString("en");
const words = { running: "training", stalled: "stalled", stopped: "stopped", done: "done", damaged: "damaged" };

// ---- asking

async function poll() {
  again = busy;
  if (busy) return;
  clearTimeout(timer);
  busy = true;
  try {
    const { folder, runs: found } = await ask("runs.json");
    $("folder").textContent = folder;
    choose(folder, found);
    list();
    for (const run of selected().filter(({ id, updated }) => columns.get(id)?.updated !== updated)) await read(run);
    await draw();
    [delay, since] = [POLL, undefined];
  } catch (error) {
    if (error.status === 401) return unlock();
    if (!(error instanceof AskError || error instanceof TypeError || error instanceof DOMException)) throw error;
    since ??= new Date().toLocaleTimeString();
    delay = Math.min(delay * 2, MOST);
  } finally {
    busy = false;
    const alive = runs.filter(({ state }) => state === "running").length;
    $("status").textContent = since
      ? `No answer since ${since}: trying again`
      : `${alive ? `${alive} training, ` : ""}up to date`;
    $("status").classList.toggle("away", Boolean(since));
    if (!$("locked").open) timer = setTimeout(poll, again ? 0 : document.hidden ? MOST : delay);
  }
}

async function read({ id, updated }) {
  const own = columns.get(id) ?? new Columns(id);
  columns.set(id, own);
  try {
    await own.read();
    [own.updated, own.problem] = [updated, undefined];
  } catch (error) {
    if (!(error instanceof AskError) || error.status === 401) throw error;
    own.problem = error.message; // of this run alone
  }
}

function unlock() {
  sessionStorage.removeItem("gpt.key");
  $("locked").onclose = () => {
    sessionStorage.setItem("gpt.key", $("key").value.trim());
    poll();
  };
  if (!$("locked").open) $("locked").showModal();
}

// ---- choosing

function choose(folder, found) {
  chosen = chosen?.folder === folder ? chosen : { folder };
  const alive = found.filter(({ state }) => state === "running");
  if (!chosen.ids && found.length) chosen.ids = (alive.length ? alive : found).slice(0, AT_FIRST).map(({ id }) => id);
  // A run that begins while somebody watches is what they wait for.
  else if (runs.length)
    chosen.ids.push(...alive.map(({ id }) => id).filter((id) => !runs.some((run) => run.id === id)));
  runs = found;
  settle();
}

function settle() {
  const there = runs.map(({ id }) => id).filter((id) => chosen.ids?.includes(id));
  for (const id of slots.keys()) if (!there.includes(id)) slots.delete(id);
  for (const id of chosen.ids ?? []) if (there.includes(id)) slot(id);
}

function slot(id) {
  if (slots.has(id)) return;
  const taken = new Set(slots.values());
  let free = 0;
  while (taken.has(free)) free++;
  slots.set(id, free);
}

const selected = () =>
  [...slots]
    .sort((a, b) => a[1] - b[1])
    .map(([id, slot]) => ({ ...runs.find((run) => run.id === id), slot, columns: columns.get(id) ?? new Columns(id) }));

function toggle(id, on) {
  chosen.ids = on ? [...chosen.ids, id] : chosen.ids.filter((each) => each !== id);
  keep();
  settle();
  list();
  poll();
}

function keep() {
  const { over, smoothing, log, whole } = view;
  try {
    localStorage.setItem("gpt.watch", JSON.stringify({ chosen, view: { over, smoothing, log, whole } }));
  } catch {} // a browser may keep nothing at all
}

// ---- all runs

const rows = new Map();

function list() {
  const alive = ({ state }) => state === "running" || state === "stalled";
  const order = [...runs].sort(
    (a, b) => alive(b) - alive(a) || (alive(a) ? a.name.localeCompare(b.name) : b.updated - a.updated),
  );
  const nodes = order.map((run) => {
    const row = rows.get(run.id) ?? newRow(run);
    const { step, steps, newest, state } = run;
    row.box.checked = slots.has(run.id);
    row.mark.replaceWith((row.mark = mark(slots.get(run.id))));
    row.state.className = `state ${state}`;
    const loss = newest.validation_loss ?? newest.loss;
    row.state.textContent = words[state] + (state === "stalled" ? ` for ${span(run.silent)}` : "");
    row.kind.textContent = run.kind;
    row.far.textContent =
      alive(run) && steps ? `${whole(step)} of ${whole(steps)}` : loss === undefined ? "" : number(loss);
    row.progress.hidden = !alive(run);
    row.progress.value = newest.progress ?? 0;
    row.node.title = run.damage;
    row.node.hidden = !run.name.toLowerCase().includes($("find").value.trim().toLowerCase());
    return row.node;
  });
  if (nodes.some((node, i) => $("runs").children[i] !== node) || nodes.length !== $("runs").children.length)
    $("runs").replaceChildren(...nodes);
  $("count").textContent = `${runs.length} run${runs.length === 1 ? "" : "s"}, ${slots.size} shown`;
}

function newRow({ id, name }) {
  const box = element("input", { type: "checkbox", onchange: () => toggle(id, box.checked) });
  const row = {
    box,
    mark: mark(),
    state: element("span", {}),
    kind: element("span", {}),
    far: element("span", { className: "far" }),
    progress: element("progress", { max: 1 }),
  };
  row.progress.ariaLabel = "progress";
  const about = element("span", { className: "about" }, row.state, row.kind, row.far);
  row.node = element(
    "li",
    {},
    element("label", {}, box, row.mark, element("span", { className: "name" }, name), about, row.progress),
  );
  rows.set(id, row);
  return row;
}

// ---- the chosen ones

async function draw() {
  const found = selected();
  const theme = dark.matches;
  for (const run of found) run.best = { ...runs.find(({ id }) => id === run.base_run)?.best_of_n, ...run.best_of_n };
  $("empty").hidden = found.length > 0;
  $("empty").textContent = runs.length
    ? "Choose runs to see them here."
    : "There is no run here yet. This page will show the first one as soon as it begins.";
  table(found);
  for (const [title, specs] of Object.entries(CHARTS)) group(title, specs, found, { ...view, theme });
  $("unzoom").hidden = !view.zoom;
  const notes = found.flatMap(({ name, columns: { place, skipped, problem } }) => [
    ...(place.every > 1 ? [`Each point of ${name} is the mean of ${place.every} lines.`] : []),
    ...(problem ? [`${name} cannot be read: ${problem}`] : []),
    ...(skipped ? [`${whole(skipped)} lines of ${name} are no records, and left out.`] : []),
  ]);
  $("notes").textContent = notes.join(" ");
  const more = others(found);
  $("rest").hidden = !more.length;
  if ($("rest").open) fill($("rest").querySelector(".grid"), more, found, { ...view, theme });
  await Promise.all([samples.draw(found), differ(found)]);
}

function group(title, specs, found, view) {
  let place = charts.get(title);
  if (!place) {
    place = element("section", { className: "group" }, element("h2", {}, title), element("div", { className: "grid" }));
    charts.set(title, place);
    $("charts").append(place);
  }
  place.hidden = false; // a chart has to be seen to be measured
  place.hidden = !fill(place.lastElementChild, specs, found, view);
}

function fill(grid, specs, found, view) {
  const there = specs.map((spec) => {
    const name = `${spec.of} ${spec.frontier ?? ""}`;
    if (!charts.has(name)) charts.set(name, new Chart(spec, { zoom, point }));
    const chart = charts.get(name);
    if (chart.node.parentElement !== grid) grid.append(chart.node);
    return chart.draw(found, view);
  });
  for (const node of [...grid.children])
    if (!specs.some((spec) => charts.get(`${spec.of} ${spec.frontier ?? ""}`).node === node)) node.remove();
  return there.some(Boolean);
}

function zoom(range) {
  view.zoom = range;
  draw();
}

function point(at, x) {
  const together = [...charts.values()].filter((chart) => chart instanceof Chart && !chart.spec.frontier);
  for (const chart of at.spec.frontier ? [at] : together) chart.point(x);
}

const COLUMNS = [
  ["", (run) => [mark(run.slot), run.name]],
  ["state", ({ state }) => [element("span", { className: `state ${state}` }, words[state])]],
  ["kind", ({ kind }) => kind],
  ["base", ({ base }) => base],
  ["size", ({ parameters }) => parameters && number(parameters)],
  ["steps", ({ step }) => step && whole(step)],
  ["tokens", ({ newest }) => newest.tokens && number(newest.tokens)],
  ["time", ({ newest }) => newest.seconds && span(newest.seconds)],
  ["left", ({ newest, state }) => state === "running" && newest.seconds_left > 0 && span(newest.seconds_left)],
  ["loss", ({ newest }) => newest.loss !== undefined && number(newest.loss)],
  ["held out", ({ newest }) => newest.validation_loss !== undefined && number(newest.validation_loss)],
  ["bits/byte", ({ newest }) => newest.validation_bits_per_byte && number(newest.validation_bits_per_byte)],
  ["order", ({ newest }) => newest.validation_accuracy && number(newest.validation_accuracy)],
  ["reward", ({ newest }) => newest.validation_reward !== undefined && number(newest.validation_reward)],
  ["gold", ({ newest }) => newest.validation_gold !== undefined && number(newest.validation_gold)],
  ["KL", ({ newest }) => newest.validation_kl !== undefined && number(newest.validation_kl)],
  ["tokens/s", ({ newest }) => newest.tokens_per_second && number(newest.tokens_per_second)],
  ["memory", ({ newest }) => newest.memory && `${number(newest.memory / 2 ** 30)} GiB`],
];

function table(found) {
  const cells = COLUMNS.map(([head, of]) => [head, found.map((run) => of(run) || "")]).filter(([, values]) =>
    values.some((value) => value.length),
  );
  $("table").replaceChildren(
    grid(
      cells.map(([head]) => head),
      found.map((_, i) => cells.map(([, values]) => values[i])),
    ),
  );
  $("table").hidden = !found.length;
}

const grid = (heads, lines) =>
  element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element(
      "tbody",
      {},
      ...lines.map((line) => element("tr", {}, ...line.map((cell) => element("td", {}, ...[cell].flat())))),
    ),
  );

/** The settings in which the chosen runs are not alike: what makes their curves differ. */
async function differ(found) {
  const sound = found.filter(({ state }) => state !== "damaged");
  const all = await Promise.all(
    sound.map(async ({ id, columns: { begun } }) => {
      const key = `${id} ${begun}`; // a run that begins anew may be another one
      if (!settings.has(key)) settings.set(key, await askOr(`settings/${id}`, {}));
      return settings.get(key);
    }),
  );
  const lines = Object.keys(all[0] ?? {})
    .map((name) => [name, ...all.map((own) => String(own[name] ?? "–"))])
    .filter(([, ...values]) => new Set(values).size > 1);
  $("differ").hidden = !lines.length;
  $("differ").firstElementChild.textContent =
    lines.length === 1 ? "1 setting differs" : `${lines.length} settings differ`;
  $("differ").lastElementChild.replaceChildren(grid(["setting", ...sound.map(({ slot }) => mark(slot))], lines));
}

// ---- what the person does

function listen() {
  const change = (changes) => (Object.assign(view, changes), keep(), draw());
  for (const radio of document.querySelectorAll("[name=over]")) {
    radio.checked = radio.value === view.over;
    radio.onchange = () => change({ over: radio.value, zoom: null });
  }
  for (const name of ["log", "whole"]) {
    $(name).checked = view[name];
    $(name).onchange = () => change({ [name]: $(name).checked });
  }
  $("smoothing").value = view.smoothing;
  $("smoothing").oninput = () => change({ smoothing: Number($("smoothing").value) });
  $("unzoom").onclick = () => zoom(null);
  $("find").oninput = list;
  $("rest").ontoggle = draw;
  dark.onchange = draw;
  document.addEventListener("visibilitychange", () => document.hidden || poll());
}

listen();
poll();
