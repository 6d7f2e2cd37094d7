// Which charts there are, of what, and how numbers are spelled on them.

export const number = (value) => {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}B`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size >= 100 ? value.toFixed(0) : size >= 1e-3 || !size ? `${+value.toPrecision(4)}` : value.toExponential(1);
};
export const span = (seconds) => {
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
  return h ? `${h}:${String(m).padStart(2, "0")}:${String(s).padStart(2, "0")}` : `${m}:${String(s).padStart(2, "0")}`;
};

const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];
/** Round values between two, about `count` of them and never many: uPlot's own way need not come to an end. */
export function ticks(low, high, count, time) {
  const rough = (high - low) / count;
  if (!(rough > 0)) return [];
  const size = 10 ** Math.floor(Math.log10(rough));
  const step =
    (time && TIMES.find((each) => each >= rough)) || [1, 2, 2.5, 5, 10].find((each) => each * size >= rough) * size;
  const first = Math.ceil(low / step);
  return Array.from(
    { length: Math.max(0, Math.min(20, Math.floor(high / step) - first + 1)) },
    (_, i) => (first + i) * step,
  );
}

// `of` is a metric of steps; its evaluations are called validation_ and the same. `fit` leaves out what is far off.
export const CHARTS = {
  Alignment: [
    { of: "gold", frontier: true, title: "Gold against √KL", unit: "grey: best of n" },
    { of: "reward", frontier: true, title: "Reward against √KL", unit: "grey: best of n" },
    { of: "reward", title: "Reward", unit: "mean of answers", smooth: true },
    { of: "gold", title: "Gold", unit: "the program's score", smooth: true },
    { of: "kl", title: "KL to the reference", unit: "nats per answer", smooth: true },
    { of: "length", title: "Length of answers", unit: "tokens", smooth: true },
  ],
  Learning: [
    { of: "loss", title: "Loss", unit: "lines: training, dots: held out", fit: true, smooth: true },
    { of: "bits_per_byte", title: "Bits per byte", fit: true, smooth: true },
    { of: "accuracy", title: "Pairs in the right order", unit: "share", smooth: true },
  ],
  "How it trains": [
    { of: "rate", title: "Learning rate", unit: "of its peak" },
    { of: "gradient_norm", title: "Gradient norm", fit: true, smooth: true },
    { of: "tokens_per_second", title: "Throughput", unit: "tokens/s", zero: true },
    { of: "memory", title: "Memory", unit: "GiB", zero: true, times: 2 ** -30 },
  ],
};
const KNOWN = new Set(
  Object.values(CHARTS)
    .flat()
    .map(({ of }) => of),
);
const AXES = new Set(["step", "tokens", "seconds", "seconds_left", "progress", "epoch", "round", "skipped"]);

/** Charts for whatever else these runs have measured. */
export const others = (runs) => {
  const names = runs.flatMap(({ columns }) => [
    ...Object.keys(columns.train),
    ...Object.keys(columns.measured).map(bare),
  ]);
  return [...new Set(names)]
    .filter((of) => !KNOWN.has(of) && !AXES.has(of))
    .sort()
    .map((of) => ({ of, title: of.replaceAll("_", " "), smooth: true }));
};
const bare = (name) => name.replace(/^validation_/, "");

export const some = (values) => values?.some((value) => value !== null);
export const has = ({ columns }, { of, frontier }) =>
  frontier
    ? some(columns.train.kl) || some(columns.measured.validation_kl)
    : some(columns.train[of]) || some(columns.measured[`validation_${of}`]);
