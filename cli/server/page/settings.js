// How the model is asked and how the page looks, within the bounds that the inputs themselves state.

import { $ } from "./dom.js";
import * as store from "./store.js";

// Each of these is an input of its name; `thoughts` is a button.
const DEFAULTS = { temperature: 0.8, top_p: 0.95, length: null, seed: null, theme: "" };
export const settings = { ...DEFAULTS, thoughts: false, ...store.loadSettings() };

/** Where nothing else is said, an answer may take half the context. */
const ordinaryLength = () => Math.min(512, Math.floor(context * 0.7));
let context = 0;

/** For a model that reads so many tokens. */
export function bound(tokens) {
  context = tokens;
  $("length").max = Math.ceil(context * 0.75);
  settings.length = Math.min(settings.length ?? ordinaryLength(), $("length").max);
  draw();
}

export function draw() {
  document.documentElement.dataset.theme = settings.theme;
  for (const name of Object.keys(DEFAULTS)) $(name).value = settings[name] ?? "";
  for (const value of document.querySelectorAll(".value")) value.textContent = settings[value.dataset.of].toFixed(2);
}

function set(name) {
  const { value, min, max, type, step } = $(name);
  const number = Math.min(Math.max(Number(value), Number(min)), Number(max));
  if (type === "select-one") settings[name] = value;
  else if (value === "") settings[name] = name === "length" ? ordinaryLength() : null;
  else settings[name] = step === "1" ? Math.round(number) : number;
  store.saveSettings(settings);
  draw();
}

function reset() {
  Object.assign(settings, DEFAULTS, { length: ordinaryLength() });
  store.saveSettings(settings);
  draw();
}

export function listen() {
  for (const name of Object.keys(DEFAULTS)) $(name).onchange = () => set(name);
  for (const name of ["temperature", "top_p"]) $(name).oninput = () => set(name);
  $("defaults").onclick = reset;
}
