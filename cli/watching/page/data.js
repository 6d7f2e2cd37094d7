// What the server has told of each run: asked for bit by bit, and kept as columns.

const POINTS = 4000; // where there are more, and twice as many as at first, a run is read again in larger steps

export class AskError extends Error {}

export async function ask(path) {
  const key = sessionStorage.getItem("gpt.key");
  const response = await fetch(path, {
    headers: key ? { Authorization: `Bearer ${key}` } : {},
    signal: AbortSignal.timeout(30_000),
  });
  if (!response.ok)
    throw Object.assign(new AskError((await response.json().catch(() => ({}))).detail), { status: response.status });
  return response.json();
}

/** What the server has, or `otherwise` where it has something against this one thing. */
export const askOr = (path, otherwise) =>
  ask(path).catch((error) => {
    if (error instanceof AskError && error.status !== 401) return otherwise;
    throw error;
  });

/** The columns of one run: `train` by the lines of its steps, `measured` by its evaluations. */
export class Columns {
  begun = 0; // how often it was read from its beginning
  place = { next: 0, tag: "", every: 1 };

  constructor(id) {
    this.id = id;
    this.clear();
  }

  clear() {
    // A file may name a metric as it likes: "constructor", say.
    [this.train, this.measured, this.skipped] = [Object.create(null), Object.create(null), 0];
  }

  async read() {
    const count = () => this.train.step?.length ?? 0;
    if (count() > this.most) this.place.next = 0;
    const whole = this.place.next === 0;
    do {
      const { next: start, tag, every } = this.place;
      const came = await ask(`metrics/${this.id}?${new URLSearchParams({ start, tag, every })}`);
      if (came.start === 0) {
        this.clear();
        this.begun++;
      }
      add(this.train, came.train);
      add(this.measured, came.measured);
      this.skipped += came.skipped;
      this.place = came;
    } while (this.place.more);
    if (whole) this.most = Math.max(POINTS, 2 * count());
    this.measured.seconds = times(this.train, this.measured.step ?? []);
  }
}

function add(kept, came) {
  const before = kept.step?.length ?? 0;
  const size = came.step?.length ?? 0;
  for (const name of new Set([...Object.keys(kept), ...Object.keys(came)])) {
    const own = (kept[name] ??= Array(before).fill(null));
    for (let i = 0; i < size; i++) own.push(came[name]?.[i] ?? null);
  }
}

/** When each evaluation was: its own line does not say, but that of the step before it does. */
function times(train, steps) {
  let at = 0;
  return steps.map((step) => {
    while (at + 1 < (train.step?.length ?? 0) && train.step[at + 1] <= step) at++;
    return train.seconds?.[at] ?? null;
  });
}

/** Exponential means, corrected for having begun at nothing. */
export function smoothed(values, weight) {
  let mean = 0,
    share = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    share = weight * share + 1 - weight;
    return mean / share;
  });
}
