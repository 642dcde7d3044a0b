// The last requests that ended, and where the time of each went.

import { json } from "./api.js";
import { blank, el, swap } from "./dom.js";
import { clock, duration, number } from "./format.js";
import { without } from "./overview.js";
import { waterfall } from "./waterfall.js";

const SHOWN = 100;
const HEADS = [
  ["Arrived"],
  ["Outcome"],
  ["Route", "wide"],
  ["Model", "wide"],
  ["Tenant", "wide"],
  ["Prompt", "number"],
  ["Output", "number"],
  ["TTFT", "number"],
  ["TPOT", "number wide"],
  ["Total", "number"],
];

export class Requests {
  title = "Requests";

  constructor(feed) {
    this.feed = feed;
    this.open = null;
    this.detail = null;
    this.filter = el("input", {
      id: "request-filter",
      type: "search",
      placeholder: "tenant, model, outcome, id",
      oninput: () => this.#fill(true),
      autocomplete: "off",
    });
    this.paused = el("input", { type: "checkbox", onchange: () => this.#fill() });
    this.list = el("div", {});
    this.element = el(
      "div",
      {},
      el(
        "div",
        { class: "bar" },
        el("h2", {}, "Last requests"),
        el(
          "div",
          { class: "tools" },
          el("label", { class: "inline" }, "Find ", this.filter),
          el("label", { class: "inline check" }, this.paused, " Hold still"),
        ),
      ),
      el("p", { class: "note" }, "The last 400 that ended. Choose one to see where its time went."),
      this.list,
    );
    feed.addEventListener("update", () => {
      if (!this.paused.checked) this.#fill();
    });
  }

  update() {
    this.#fill(true);
  }

  #fill(force = false) {
    const { feed } = this;
    if (!this.element.isConnected) return;
    const message = feed.now ? null : without(feed);
    if (message) {
      this.shown = null;
      this.list.replaceChildren(message);
      return;
    }
    const wanted = this.filter.value.trim().toLowerCase();
    const rows = feed.requests
      .filter(
        (row) =>
          !wanted ||
          [row.id, row.tenant, row.model, row.adapter, row.outcome, row.route, row.error].some(
            (text) => text.toLowerCase().includes(wanted),
          ),
      )
      .slice(-SHOWN)
      .reverse();
    const shown = `${rows[0]?.id} ${rows.length} ${wanted} ${this.open}`;
    if (!force && shown === this.shown) return;
    this.shown = shown;
    if (!rows.length) {
      this.list.replaceChildren(
        blank(
          wanted ? "None of them matches" : "No requests yet",
          wanted ? null : "Requests appear here when they have ended.",
        ),
      );
      return;
    }
    const focused = document.activeElement?.dataset?.request;
    swap(
      this.list,
      el(
        "div",
        { class: "scroll card", tabindex: 0, role: "region", "aria-label": "Last requests" },
        el(
          "table",
          { class: "requests" },
          el("caption", { class: "unseen" }, "Last requests, newest first"),
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              HEADS.map(([label, kind]) => el("th", { scope: "col", class: kind ?? null }, label)),
            ),
          ),
          el(
            "tbody",
            {},
            rows.flatMap((row) => this.#rows(row)),
          ),
        ),
      ),
    );
    if (focused) this.list.querySelector(`[data-request="${CSS.escape(focused)}"]`)?.focus();
  }

  #rows(row) {
    const open = row.id === this.open;
    const button = el(
      "button",
      {
        class: "link",
        type: "button",
        "aria-expanded": String(open),
        "aria-label": `Request of ${clock(row.at_s)}, ${row.outcome}: where its time went`,
        dataset: { request: row.id },
        onclick: () => this.#toggle(row.id),
      },
      clock(row.at_s),
    );
    const cells = [
      [button],
      [el("span", { class: `badge o-${row.outcome}`, title: row.error || null }, row.outcome)],
      [row.route, "wide"],
      [row.adapter ? `${row.model} + ${row.adapter}` : row.model || "–", "wide"],
      [row.tenant || "–", "wide"],
      [number(row.prompt_tokens), "number"],
      [number(row.completion_tokens), "number"],
      [duration(row.ttft_ms), "number"],
      [duration(row.tpot_ms), "number wide"],
      [duration(row.total_ms), "number"],
    ];
    const line = el(
      "tr",
      { class: open ? "open" : null },
      cells.map(([content, kind]) => el("td", { class: kind ?? null }, content)),
    );
    return open
      ? [
          line,
          el(
            "tr",
            { class: "detail" },
            el(
              "td",
              { colspan: HEADS.length },
              this.detail ?? el("p", { class: "note" }, "Loading"),
            ),
          ),
        ]
      : [line];
  }

  async #toggle(id) {
    this.open = this.open === id ? null : id;
    this.detail = null;
    this.#fill(true);
    if (!this.open) return;
    try {
      this.detail = waterfall(await json(`/console/request?id=${encodeURIComponent(id)}`));
    } catch (error) {
      this.detail = el("p", { class: "error-text" }, error.message);
    }
    if (this.open === id) this.#fill(true);
  }
}
