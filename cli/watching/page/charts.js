// How a chart is drawn with uPlot (a global of its own script).

import { element } from "./shared/dom.js";
import { smoothed } from "./data.js";
import { has, number, some, span, ticks } from "./specs.js";

const COLOURS = 7;
const BEHIND = { measured: "train", trail: "policy" }; // which of a run's two lines has no letter of its own
const TINY = 1e-12; // what is below has no place on a logarithmic axis
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];

export const letter = (slot) => (slot < 26 ? String.fromCharCode(65 + slot) : String(slot + 1));
export const mark = (slot) =>
  element(
    "span",
    { className: slot === undefined ? "mark" : `mark c${slot % COLOURS}` },
    slot === undefined ? "" : letter(slot),
  );
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
/** light-dark() as the canvas wants it. */
function colour(name) {
  const probe = element("i", {});
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

export class Chart {
  constructor(spec, actions) {
    this.spec = spec;
    this.actions = actions;
    this.at = element("span", { className: "hint at" });
    this.readout = element("div", { className: "readout" });
    this.place = element("div", { tabIndex: 0, onkeydown: (event) => this.walk(event) });
    this.place.setAttribute("role", "img");
    const title = element(
      "figcaption",
      {},
      element("span", {}, spec.title),
      spec.unit && element("span", { className: "hint" }, spec.unit),
      this.at,
    );
    this.node = element("figure", {}, title, this.readout, this.place);
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.place);
  }

  size = () => ({ width: Math.max(this.place.clientWidth, 100), height: 220 });

  /** Shows these runs as the view says; false, and nothing, where none has anything of this. */
  draw(runs, view) {
    this.runs = runs.filter((run) => has(run, this.spec));
    this.view = view;
    const tables = this.spec.frontier ? this.frontier() : this.lines();
    this.node.hidden = !tables.length;
    if (this.node.hidden) return false;
    const data = uPlot.join(tables.map(({ xs, ys }) => [xs, ys]));
    const kind = JSON.stringify([
      view.over,
      this.log,
      view.theme,
      tables.map(({ kind, run }) => [kind, run.slot, run.name]),
    ]);
    let at = null;
    if (this.kind !== kind) {
      if (this.over === view.over && this.plot?.cursor.left >= 0) at = this.plot.data[0][this.plot.cursor.idx] ?? null;
      this.plot?.destroy();
      this.kind = kind;
      this.over = view.over;
      this.tables = tables;
      this.plot = new uPlot(this.options(), data, this.place);
    } else {
      this.tables = tables;
      this.plot.setData(data, false);
    }
    this.zoom(view.zoom);
    // A reader keeps the place that was pointed at. uPlot, too, waits for a microtask before it knows its scales.
    if (at !== null) queueMicrotask(() => this.point(at));
    this.tell();
    return true;
  }

  lines() {
    const {
      spec: { of, smooth, times = 1 },
      view: { over, smoothing },
    } = this;
    const all = this.runs.flatMap(({ columns: { train, measured } }) => [
      ...(train[of] ?? []),
      ...(measured[`validation_${of}`] ?? []),
    ]);
    // Without an end above 0 a logarithmic axis would never end.
    this.log = this.view.log && all.some((value) => value > TINY) && !all.some((value) => value < 0);
    return this.runs.flatMap((run) => {
      const { train, measured } = run.columns;
      const tables = [];
      const table = (kind, xs, ys) => {
        const there = (xs ?? []).map((x, i) => i).filter((i) => xs[i] !== null);
        const value = (y) => (y === null || (this.log && y < TINY) ? null : y * times);
        if (there.length) tables.push({ kind, run, xs: there.map((i) => xs[i]), ys: there.map((i) => value(ys[i])) });
      };
      if (some(train[of])) {
        const soft = smooth && smoothing > 0;
        if (soft) table("raw", train[over], train[of]);
        table("train", train[over], soft ? smoothed(train[of], smoothing) : train[of]);
      }
      if (some(measured[`validation_${of}`])) table("measured", measured[over], measured[`validation_${of}`]);
      return tables;
    });
  }

  /**
   * A point for each evaluation of a policy, behind them the way of its rounds in training; and as lines what the best
   * of n answers of its base would score.
   */
  frontier() {
    const {
      spec: { of },
      view: { smoothing },
    } = this;
    const table = (kind, run, path, more) => {
      const sound = path.filter(({ x, y }) => x >= 0 && y != null);
      const sorted = [...new Map(sound.map((point) => [point.x, point])).values()].sort((a, b) => a.x - b.x);
      return sound.length
        ? [{ kind, run, path: sound, xs: sorted.map(({ x }) => x), ys: sorted.map(({ y }) => y), ...more }]
        : [];
    };
    const own = this.runs.flatMap((run) => {
      const { train, measured: m } = run.columns;
      const rounds = (train.step ?? [])
        .map((step, i) => i)
        .filter((i) => some([train.kl?.[i] ?? null]) && some([train[of]?.[i] ?? null]));
      const [kl, score] = [train.kl, train[of]].map((values) =>
        smoothed(
          rounds.map((i) => values[i]),
          smoothing,
        ),
      );
      const trail = rounds.map((round, i) => ({ x: Math.sqrt(Math.max(kl[i], 0)), y: score[i] }));
      const path = (m.step ?? []).map((step, i) => ({
        x: Math.sqrt(Math.max(m.validation_kl?.[i] ?? NaN, 0)),
        y: m[`validation_${of}`]?.[i],
        error: m[`validation_${of}_error`]?.[i],
      }));
      return [...table("trail", run, trail), ...table("policy", run, path)];
    });
    const bases = own.length ? new Map(this.runs.flatMap(({ best }) => Object.entries(best ?? {}))) : [];
    const best = [...bases].flatMap(([kind, points]) =>
      table(
        kind,
        { name: kind },
        points.map((point) => ({ x: Math.sqrt(point.kl ?? NaN), y: point[of], n: point.n })),
      ),
    );
    return [...best, ...own];
  }

  options() {
    const {
      spec,
      view: { over },
    } = this;
    const [ink, line, faint] = ["--faint", "--line", "--faint"].map(colour);
    const font = `12px ${css("--sans")}`;
    const axis = { stroke: ink, font, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 } };
    const x = spec.frontier ? (value) => number(value ** 2) : over === "seconds" ? span : number;
    const series = this.tables.map(({ kind, run }) => {
      const stroke = run.slot === undefined ? faint : colour(`--curve-${run.slot % COLOURS}`);
      const dash = DASHES[Math.floor((run.slot ?? 0) / COLOURS) % DASHES.length];
      const dots = { show: true, size: 6, fill: stroke, stroke, width: 1 };
      const common = { stroke, spanGaps: true, points: { show: false } };
      if (kind === "raw") return { ...common, width: 1, alpha: 0.28 };
      if (kind === "measured") return { ...common, width: 1, dash: [3, 3], points: dots };
      if (kind === "trail") return { ...common, paths: () => null };
      if (kind === "policy") return { ...common, paths: () => null, points: { ...dots, size: 7 } };
      return {
        ...common,
        width: kind === "train" ? 1.75 : 1.25,
        dash: kind === "best of n by gold" ? [2, 3] : dash,
        points: kind === "train" ? { show: false } : { ...dots, size: 4 },
      };
    });
    return {
      ...this.size(),
      padding: [8, 22, 0, 0],
      legend: { show: false },
      scales: {
        x: { time: false, ...(spec.frontier && { range: (u, low, high) => [0, high * 1.05 || 1] }) },
        y: { distr: this.log ? 3 : 1, range: (u, low, high) => this.range(u, low, high) },
      },
      axes: [
        {
          ...axis,
          size: 30,
          splits: (u, i, low, high) => ticks(low, high, u.width / 75, over === "seconds" && !spec.frontier),
          values: (u, at) => at.map(x),
        },
        {
          ...axis,
          size: 54,
          space: 32,
          ...(!this.log && { splits: (u, i, low, high) => ticks(low, high, 5) }),
          values: (u, at) => at.map((tick) => (tick === null ? null : number(tick))),
        },
      ],
      series: [{}, ...series],
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        hover: { skip: [undefined, null] },
        points: { size: 7, width: 0 },
        ...(!spec.frontier && { sync: { key: "watch", filters: { pub: (type) => /move|leave/.test(type) } } }),
        bind: { dblclick: () => () => (this.actions.zoom(null), null) },
      },
      hooks: {
        setCursor: [() => this.tell()],
        setSelect: [(u) => this.selected(u)],
        drawClear: [(u) => this.under(u)],
        draw: [(u) => this.names(u)],
      },
    };
  }

  /** The ends of the y axis: those of what is seen, without the first steps of a run where they are far off. */
  range(u, low, high) {
    const { spec, view } = this;
    if (!Number.isFinite(low) || !Number.isFinite(high)) return [0.1, 1];
    if (this.log) return [low / 1.05, high * 1.05];
    if (spec.fit && !view.whole && u.series[0].idxs) {
      const [from, to] = u.series[0].idxs;
      const most = u.data.slice(1).map((values) => {
        const own = values
          .slice(from, to + 1)
          .filter((value) => value != null)
          .sort((a, b) => a - b);
        return own[Math.floor((own.length - 1) * 0.95)] ?? low;
      });
      high = Math.max(...most);
    }
    if (spec.zero) low = 0;
    const room = Math.max(high - low, Math.abs(high) * 1e-6, 1e-30) * 0.08;
    return [spec.zero ? 0 : low - room, high + room];
  }

  selected(u) {
    const { left, width } = u.select;
    if (width < 5) return;
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    if (!this.spec.frontier) this.actions.zoom([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
  }

  zoom(range) {
    if (this.spec.frontier || !range) range = [this.plot.data[0][0], this.plot.data[0].at(-1)];
    this.plot.setScale("x", { min: range[0], max: range[1] === range[0] ? range[0] + 1 : range[1] });
  }

  /** A policy's way, from its first evaluation to its last, with a standard error to both sides. */
  under(u) {
    if (!this.spec.frontier) return;
    this.clipped(u, (ctx, x, y) => {
      for (const { kind, run, path } of this.tables) {
        ctx.fillStyle = ctx.strokeStyle =
          run.slot === undefined ? colour("--faint") : colour(`--curve-${run.slot % COLOURS}`);
        if (run.slot === undefined) {
          for (const point of path)
            ctx.fillText(point.n, x(point.x) + 4 * devicePixelRatio, y(point.y) + 13 * devicePixelRatio);
          continue;
        }
        ctx.globalAlpha = kind === "trail" ? 0.6 : 0.4;
        ctx.beginPath();
        path.forEach((point, i) => ctx[i ? "lineTo" : "moveTo"](x(point.x), y(point.y)));
        for (const point of path.filter(({ error }) => error)) {
          ctx.moveTo(x(point.x), y(point.y - point.error));
          ctx.lineTo(x(point.x), y(point.y + point.error));
        }
        ctx.stroke();
        ctx.globalAlpha = 1;
      }
    });
  }

  /** Each line's letter at its end: nobody has to tell colours apart. */
  names(u) {
    const ends = this.tables
      .flatMap(({ kind, run, path }, i) => {
        if (
          run.slot === undefined ||
          kind === "raw" ||
          (BEHIND[kind] && this.tables.some((other) => other.run === run && other.kind === BEHIND[kind]))
        )
          return [];
        const [from, to] = u.series[0].idxs;
        let at = to;
        while (at > from && u.data[i + 1][at] == null) at--;
        const [x, y] = path ? [path.at(-1).x, path.at(-1).y] : [u.data[0][at], u.data[i + 1][at]];
        return y == null ? [] : [{ run, x: u.valToPos(x, "x", true), y: u.valToPos(y, "y", true) }];
      })
      .sort((a, b) => a.y - b.y);
    const { ctx } = u;
    ctx.save();
    ctx.font = `700 ${12 * devicePixelRatio}px ${css("--sans")}`;
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    const [size, placed] = [12 * devicePixelRatio, []];
    for (const { run, x, y } of ends) {
      let at = Math.min(Math.max(y, u.bbox.top + size / 2), u.bbox.top + u.bbox.height);
      for (const other of placed) if (Math.abs(other.x - x) < size && at < other.at + size) at = other.at + size;
      placed.push({ x, at });
      ctx.fillStyle = colour(`--curve-${run.slot % COLOURS}`);
      ctx.fillText(letter(run.slot), x + 7 * devicePixelRatio, at);
    }
    ctx.restore();
  }

  clipped(u, work) {
    const { ctx } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    ctx.clip();
    ctx.lineWidth = devicePixelRatio;
    ctx.font = `${11 * devicePixelRatio}px ${css("--sans")}`;
    work(
      ctx,
      (value) => u.valToPos(value, "x", true),
      (value) => u.valToPos(value, "y", true),
    );
    ctx.restore();
  }

  /** Says each run's value where the cursor is, or its newest. */
  tell() {
    const { plot, spec } = this;
    if (!plot) return;
    const held = plot.cursor.left >= 0 && plot.cursor.idxs;
    const value = (i) => {
      const values = plot.data[i + 1];
      if (held) return values[plot.cursor.idxs[i + 1]];
      if (this.tables[i].path) return this.tables[i].path.at(-1).y;
      return values.findLast((each) => each != null);
    };
    const parts = this.runs.flatMap((run) => {
      const own = this.tables
        .map((table, i) => ({ kind: table.kind, run: table.run, i }))
        .filter((table) => table.run === run && table.kind !== "raw");
      const told = own.filter(({ kind }) => kind !== "trail" || own.length === 1);
      const words = told.map(({ kind, i }) =>
        element("span", { className: kind }, (kind === "measured" ? " ● " : "") + number(value(i))),
      );
      return words.length ? [element("span", { title: run.name }, mark(run.slot), ...words)] : [];
    });
    this.readout.replaceChildren(...parts);
    const at = held && plot.data[0][plot.cursor.idx];
    const none = at == null || at === false;
    const over = { tokens: (v) => `${number(v)} tokens`, seconds: span, step: (v) => `step ${number(v)}` }[
      this.view.over
    ];
    this.at.textContent = none ? "" : spec.frontier ? `KL ${number(at ** 2)}` : over(at);
    this.place.ariaLabel = `${spec.title} ${this.at.textContent}: ${parts.map((part) => `${part.title} ${part.textContent}`).join(", ")}`;
  }

  walk(event) {
    const way = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (event.key === "Escape") this.actions.point(this, null);
    if (!way) return;
    event.preventDefault();
    const xs = this.plot.data[0];
    const from = this.plot.cursor.left >= 0 ? this.plot.cursor.idx : xs.length - 1;
    this.actions.point(this, xs[Math.max(0, Math.min(xs.length - 1, from + way * Math.ceil(xs.length / 100)))]);
  }

  /** Puts the cursor there, as the mouse would. */
  point(x) {
    this.plot?.setCursor({ left: x === null ? -10 : this.plot.valToPos(x, "x"), top: 10 });
  }
}
