// Asks the server for what is new, once a second while the page is seen, and keeps it.
// States: "waiting", "live", "key" (none, or a wrong one), "forbidden" (not an admin's),
// "off" (nothing is observed, or the observer is down), "down" (no server).

import { ApiError, json } from "./api.js";

const PERIOD_MS = 1000;
const ANSWER_MS = 5000;
const SLOW_PERIOD_MS = 15_000;
const MAX_PAUSE_MS = 5000;
const KEPT = { 1: 900, 60: 1440 };
const MAX_REQUESTS = 400;

export class Feed extends EventTarget {
  state = "waiting";
  error = "";
  now = null;
  step = 1;
  requests = [];
  updatedMs = 0;
  #series = {};
  #requestsNext = 0;
  #life = "";
  #timer = 0;
  #asking = null;
  #failures = 0;
  #slowMs = 0;

  /** Points of the chosen step: {stepS, endS, columns} or null. */
  get series() {
    return this.#series[this.step] ?? null;
  }

  /** Chooses seconds (1) or minutes (60). */
  choose(step) {
    if (step === this.step) return;
    this.step = step;
    this.#slowMs = 0;
    this.poke();
  }

  /** Forgets what was told to another key. */
  clear() {
    this.now = null;
    this.requests = [];
    this.#series = {};
    this.#requestsNext = 0;
    this.#life = "";
  }

  /** Asks now. */
  poke() {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    this.#ask();
  }

  /** Begins, and pauses while nobody looks. */
  start() {
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.poke();
    });
    this.#ask();
  }

  async #ask() {
    const abort = (this.#asking = new AbortController());
    try {
      await this.#askOnce(AbortSignal.any([abort.signal, AbortSignal.timeout(ANSWER_MS)]));
      this.#failures = 0;
      this.#turn("live", "");
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.#failures += 1;
      const states = { 0: "down", 401: "key", 403: "forbidden" };
      this.#turn(states[error.status] ?? "off", error.message);
    }
    if (abort.signal.aborted || document.hidden) return;
    const pause = Math.min(MAX_PAUSE_MS, PERIOD_MS * (1 + this.#failures));
    this.#timer = setTimeout(() => this.#ask(), this.state === "key" ? MAX_PAUSE_MS : pause);
  }

  async #askOnce(signal) {
    // Minutes change slowly: between two looks at them only the numbers of now are asked for.
    const slow = this.step === 60 && Date.now() - this.#slowMs < SLOW_PERIOD_MS && this.#series[60];
    const step = slow ? 1 : this.step;
    const since = this.#series[step]?.next ?? -1;
    const told = await json(
      `/console/data?step=${step}&since=${since}&requests=${this.#requestsNext}`,
      { signal },
    );
    if (step === 60) this.#slowMs = Date.now();
    this.#join(step, told.series);
    this.#joinRequests(told.requests, told.life);
    this.now = told;
    this.updatedMs = Date.now();
  }

  /** Puts what was told behind what is known; where nobody watched in between, there is a gap. */
  #join(step, told) {
    const old = this.#series[step];
    const goesOn = old && told.next >= old.next && told.first > old.first;
    const gap = goesOn
      ? Array(Math.min(KEPT[step], Math.max(0, told.first - old.next - 1))).fill(null)
      : [];
    const columns = {};
    for (const [name, values] of Object.entries(told.columns)) {
      const before = goesOn ? (old.columns[name] ?? []).slice(0, told.first - old.first) : [];
      columns[name] = [...before, ...gap, ...values].slice(-KEPT[step]);
    }
    const size = Object.values(columns)[0]?.length ?? 0;
    this.#series[step] = {
      stepS: told.step_s,
      first: told.next - size + 1,
      next: told.next,
      endS: told.end_s,
      columns,
    };
  }

  #joinRequests(told, life) {
    if (life !== this.#life) {
      // Another observer counts from the beginning: ask it for all it has.
      const anew = this.#life !== "";
      this.#life = life;
      this.#requestsNext = 0;
      if (anew) return;
    }
    this.#requestsNext = told.next;
    const known = new Set(this.requests.map((row) => row.id));
    this.requests = this.requests
      .concat(told.rows.filter((row) => !known.has(row.id)))
      .slice(-MAX_REQUESTS);
  }

  #turn(state, error) {
    const changed = state !== this.state;
    if (state === "key" || state === "forbidden") this.clear();
    this.state = state;
    this.error = error;
    if (changed) this.dispatchEvent(new Event("state"));
    this.dispatchEvent(new Event("update"));
  }
}
