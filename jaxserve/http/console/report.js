// What the tabs of SLOs, costs and alerts have in common: each asks its own routes while it is seen.

import { blank, el, swap } from "./dom.js";
import { percent } from "./format.js";

const PERIOD_MS = 10_000;

export class Report {
  /** @param {string} heading @param {string} absent what to say where there is no such route. */
  constructor(heading, absent) {
    this.absent = absent;
    this.bar = el("div", { class: "bar" }, el("h2", {}, heading));
    this.content = el("div", {}, blank("Loading", null));
    this.element = el("div", {}, this.bar, this.content);
    this.shown = "";
  }

  /** Shown, or the key has changed. */
  async update() {
    clearTimeout(this.timer);
    let doc = null;
    let failure = null;
    try {
      doc = await this.ask();
    } catch (error) {
      failure = error;
    }
    if (!this.element.isConnected) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (this.element.isConnected) this.update();
    }, PERIOD_MS);
    const shown = failure ? `${failure.status} ${failure.message}` : JSON.stringify(doc);
    if (shown === this.shown) return;
    this.shown = shown;
    swap(this.content, failure ? this.#refused(failure) : this.show(doc));
  }

  #refused(error) {
    if (error.status === 401) return blank("A key is needed", "Enter a key above.");
    if (error.status === 403) return blank("This key is not an admin's", error.message);
    if (error.status === 404) return blank("Not configured", this.absent);
    if (error.status === 503) return blank("Not available", error.message);
    return blank("This did not work", error.message, "error");
  }
}

// ---------------------------------------------------------------- pieces

export function fact(name, value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value));
}

export function tile(label, value, sub) {
  return el(
    "div",
    { class: "tile" },
    el("dt", {}, label),
    el("dd", { class: "value" }, value),
    el("dd", { class: "sub" }, sub),
  );
}

export function meter(label, value) {
  return el(
    "div",
    { class: "meter" },
    el("span", {}, label),
    el("b", {}, percent(value)),
    track(value),
  );
}

export function track(value) {
  const fill = el("span", { class: "meter-fill" });
  fill.style.width = `${100 * Math.min(1, Math.max(0, Number.isFinite(value) ? value : 0))}%`;
  return el("span", { class: "meter-track", "aria-hidden": "true" }, fill);
}
