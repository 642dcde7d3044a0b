// The last requests that ended, and where the time of each went.

import { json } from "./api.js";
import { blank, el } from "./dom.js";
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
    this.lines = new Map(); // table rows by request
    this.detailCell = el("td", { colspan: HEADS.length });
    this.detail = el("tr", { class: "detail" }, this.detailCell);
    this.tbody = el("tbody", {});
    this.table = this.#makeTable();
    this.filter = el("input", {
      id: "request-filter",
      type: "search",
      placeholder: "tenant, model, outcome, id",
      oninput: () => this.#fill(),
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
    this.#fill();
  }

  #fill() {
    const { feed } = this;
    if (!this.element.isConnected) return;
    const message = feed.now ? null : without(feed);
    if (message) {
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
    if (!rows.length) {
      this.list.replaceChildren(
        blank(
          wanted ? "None of them matches" : "No requests yet",
          wanted ? null : "Requests appear here when they have ended.",
        ),
      );
      return;
    }
    if (this.table.parentNode !== this.list) this.list.replaceChildren(this.table);
    this.#place(rows.flatMap((row) => this.#shown(row)));
  }

  /** Has these rows in the table; those that are there stay untouched, under a finger too. */
  #place(wanted) {
    let at = this.tbody.firstChild;
    for (const line of wanted) {
      if (line === at) at = at.nextSibling;
      else this.tbody.insertBefore(line, at);
    }
    while (at) {
      const next = at.nextSibling;
      this.lines.delete(at.dataset.request);
      at.remove();
      at = next;
    }
  }

  #makeTable() {
    const heads = HEADS.map(([label, kind]) =>
      el("th", { scope: "col", class: kind ?? null }, label),
    );
    return el(
      "div",
      { class: "scroll card", tabindex: 0, role: "region", "aria-label": "Last requests" },
      el(
        "table",
        { class: "requests" },
        el("caption", { class: "unseen" }, "Last requests, newest first"),
        el("thead", {}, el("tr", {}, heads)),
        this.tbody,
      ),
    );
  }

  #shown(row) {
    if (!this.lines.has(row.id)) this.lines.set(row.id, this.#makeLine(row));
    const line = this.lines.get(row.id);
    const open = row.id === this.open;
    line.className = open ? "open" : "";
    line.querySelector("button").setAttribute("aria-expanded", String(open));
    return open ? [line, this.detail] : [line];
  }

  #makeLine(row) {
    const button = el(
      "button",
      {
        class: "link",
        type: "button",
        "aria-label": `Request of ${clock(row.at_s)}, ${row.outcome}: where its time went`,
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
    return el(
      "tr",
      { dataset: { request: row.id } },
      cells.map(([content, kind]) => el("td", { class: kind ?? null }, content)),
    );
  }

  async #toggle(id) {
    this.open = this.open === id ? null : id;
    this.detailCell.replaceChildren(el("p", { class: "note" }, "Loading"));
    this.#fill();
    if (!this.open) return;
    let content;
    try {
      content = waterfall(await json(`/console/request?id=${encodeURIComponent(id)}`));
    } catch (error) {
      content = el("p", { class: "error-text" }, error.message);
    }
    if (this.open === id) this.detailCell.replaceChildren(content);
  }
}
