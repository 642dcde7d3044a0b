// Line charts in SVG: axes with units, a cursor for mouse and keys, and the numbers as a table.
// A value that is null is a gap; only gaps shorter than `BRIDGE` points are drawn across.

import { el, say, svg, swap } from "./dom.js";
import { clock } from "./format.js";

const HEIGHT = 150;
const PAD = { left: 52, right: 10, top: 10, bottom: 22 };
const BRIDGE = 5;
const TABLE_ROWS = 30;

export class LineChart {
  /**
   * @param {{title: string, about: string, series: {name: string, label: string}[],
   *   format: (value: number) => string, tick?: (value: number) => string, empty?: string,
   *   max?: number, headline?: number}} options
   *   tick: as `format`, at the axis;
   *   max: the axis goes at least so far; headline: which line's last value stands beside the title.
   */
  constructor(options) {
    this.options = options;
    this.view = null;
    this.cursor = null;
    this.width = 0;
    this.svg = svg("svg", { class: "plot", height: HEIGHT, tabindex: 0, role: "img" });
    this.readout = el("div", { class: "readout", hidden: true });
    this.latest = el("span", { class: "latest" });
    this.live = el("span", { class: "unseen", role: "status" });
    this.values = el("div", { class: "values", hidden: true });
    const toggle = el(
      "button",
      {
        class: "quiet small",
        type: "button",
        "aria-expanded": "false",
        "aria-label": `${options.title} as a table`,
        onclick: () => this.#toggle(toggle),
      },
      "Table",
    );
    const legend =
      options.series.length > 1
        ? el(
            "ul",
            { class: "legend" },
            options.series.map((series, index) =>
              el(
                "li",
                {},
                svg(
                  "svg",
                  { width: 18, height: 8, "aria-hidden": "true" },
                  svg("line", { class: `s${index}`, x1: 1, y1: 4, x2: 17, y2: 4 }),
                ),
                series.label,
              ),
            ),
          )
        : null;
    this.element = el(
      "figure",
      { class: "chart card" },
      el("figcaption", {}, el("h3", {}, options.title), this.latest, toggle, legend),
      el("div", { class: "stage" }, this.svg, this.readout),
      this.values,
      this.live,
    );
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#setCursor(null));
    this.svg.addEventListener("keydown", (event) => this.#key(event));
    this.svg.addEventListener("blur", () => this.#setCursor(null));
    new ResizeObserver(([entry]) => {
      this.width = Math.round(entry.contentRect.width);
      this.#draw();
    }).observe(this.svg.parentElement);
  }

  /** Shows the last `points` of a series ({stepS, endS, columns}); `note` stands beside the latest value. */
  update(series, points, note = "") {
    this.note = note;
    const columns = this.options.series.map(({ name }) =>
      (series?.columns[name] ?? []).slice(-points),
    );
    const size = Math.max(0, ...columns.map((column) => column.length));
    this.view = { columns, size, points, stepS: series?.stepS ?? 1, endS: series?.endS ?? 0 };
    if (this.cursor !== null && this.cursor >= size) this.cursor = null;
    this.#draw();
    if (!this.values.hidden) this.#fillTable();
  }

  #timeOf(index) {
    const { size, stepS, endS } = this.view;
    return endS - (size - 1 - index) * stepS;
  }

  #draw() {
    const { view, width } = this;
    if (!view || width < 80) return;
    const values = view.columns.flat().filter((value) => value !== null);
    const last = view.columns.map((column) => column.findLast((value) => value !== null) ?? null);
    const headline = last[this.options.headline ?? 0];
    say(this.latest, headline === null ? "" : `${this.options.format(headline)}${this.note}`);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("aria-label", this.#summary(values));
    const parts = [];
    if (!values.length) {
      parts.push(
        svg("line", {
          class: "axis",
          x1: PAD.left,
          x2: width - PAD.right,
          y1: HEIGHT - PAD.bottom,
          y2: HEIGHT - PAD.bottom,
        }),
        svg(
          "text",
          { class: "none", x: (width + PAD.left) / 2, y: HEIGHT / 2, "text-anchor": "middle" },
          this.options.empty ?? "Nothing to show in this time",
        ),
      );
      this.scale = null;
    } else {
      const ticks = niceTicks(Math.max(...values, this.options.max ?? 0));
      this.scale = {
        x: (index) =>
          PAD.left +
          ((index + view.points - view.size) / Math.max(1, view.points - 1)) *
            (width - PAD.left - PAD.right),
        y: (value) =>
          HEIGHT - PAD.bottom - (value / ticks.at(-1)) * (HEIGHT - PAD.top - PAD.bottom),
      };
      for (const tick of ticks) {
        const y = Math.round(this.scale.y(tick)) + 0.5;
        parts.push(
          svg("line", {
            class: tick ? "grid" : "axis",
            x1: PAD.left,
            x2: width - PAD.right,
            y1: y,
            y2: y,
          }),
        );
        parts.push(
          svg(
            "text",
            { class: "tick", x: PAD.left - 6, y: y + 3.5, "text-anchor": "end" },
            (this.options.tick ?? this.options.format)(tick),
          ),
        );
      }
      parts.push(...this.#times());
      view.columns.forEach((column, index) => parts.push(...this.#line(column, index)));
    }
    this.marks = svg("g", { class: "cursor" });
    this.svg.replaceChildren(...parts, this.marks);
    this.#drawCursor();
  }

  #times() {
    const { view, width } = this;
    const span = view.points * view.stepS;
    const room = Math.max(2, Math.floor((width - PAD.left - PAD.right) / 80));
    const every =
      [30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200].find(
        (s) => span / s <= room,
      ) ?? 86400;
    const zone = new Date(view.endS * 1000).getTimezoneOffset() * 60;
    const parts = [];
    const oldest = view.endS - (view.points - 1) * view.stepS;
    for (let at = Math.ceil((oldest - zone) / every) * every + zone; at <= view.endS; at += every) {
      const index = view.size - 1 - (view.endS - at) / view.stepS;
      const x = this.scale.x(index);
      if (x < PAD.left + 12 || x > width - PAD.right - 14) continue;
      parts.push(
        svg(
          "text",
          { class: "tick", x, y: HEIGHT - 6, "text-anchor": "middle" },
          clock(at, every < 60),
        ),
      );
    }
    return parts;
  }

  #line(column, index) {
    const { x, y } = this.scale;
    let path = "";
    let before = -Infinity;
    const lone = [];
    column.forEach((value, at) => {
      if (value === null) return;
      const joined = at - before <= BRIDGE;
      path += `${joined ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      const next = column.slice(at + 1, at + 1 + BRIDGE).some((other) => other !== null);
      if (!joined && !next) lone.push([at, value]);
      before = at;
    });
    return [
      svg("path", { class: `line s${index}`, d: path }),
      ...lone.map(([at, value]) =>
        svg("circle", { class: `lone f${index}`, cx: x(at), cy: y(value), r: 1.8 }),
      ),
    ];
  }

  #summary(values) {
    const { title, about, series, format } = this.options;
    if (!values.length) return `${title}. ${about} No values in this time.`;
    const said = series.map(({ label }, index) => {
      const own = this.view.columns[index].filter((value) => value !== null);
      return own.length
        ? `${label}: now ${format(own.at(-1))}, highest ${format(Math.max(...own))}`
        : `${label}: none`;
    });
    return `${title}. ${about} ${said.join("; ")}. Arrow keys read single points.`;
  }

  #point(event) {
    const { view, width } = this;
    if (!view?.size || !this.scale) return;
    const box = this.svg.getBoundingClientRect();
    const share = (event.clientX - box.left - PAD.left) / (width - PAD.left - PAD.right);
    const index = Math.round(share * (view.points - 1)) - (view.points - view.size);
    this.#setCursor(Math.min(view.size - 1, Math.max(0, index)));
  }

  #key(event) {
    const size = this.view?.size ?? 0;
    const jump = event.shiftKey ? 10 : 1;
    const at = this.cursor ?? size;
    const to = { ArrowLeft: at - jump, ArrowRight: at + jump, Home: 0, End: size - 1 }[event.key];
    if (event.key === "Escape") this.#setCursor(null);
    if (to === undefined || !size || !this.scale) return;
    event.preventDefault();
    this.#setCursor(Math.min(size - 1, Math.max(0, to)));
    say(
      this.live,
      `${clock(this.#timeOf(this.cursor))}: ${this.#readings()
        .map(([label, text]) => `${label} ${text}`)
        .join(", ")}`,
    );
  }

  #setCursor(index) {
    this.cursor = index;
    this.#drawCursor();
  }

  #readings() {
    return this.options.series.map(({ label }, index) => {
      const value = this.view.columns[index][this.cursor];
      return [
        label,
        value === null || value === undefined ? "no value" : this.options.format(value),
      ];
    });
  }

  #drawCursor() {
    const { cursor, view, scale, width } = this;
    this.readout.hidden = cursor === null || !scale;
    if (!this.marks) return;
    this.marks.replaceChildren();
    if (this.readout.hidden) return;
    const x = scale.x(cursor);
    this.marks.append(
      svg("line", { class: "at", x1: x, x2: x, y1: PAD.top, y2: HEIGHT - PAD.bottom }),
    );
    view.columns.forEach((column, index) => {
      const value = column[cursor];
      if (value !== null && value !== undefined)
        this.marks.append(svg("circle", { class: `f${index}`, cx: x, cy: scale.y(value), r: 3.2 }));
    });
    this.readout.replaceChildren(
      el("div", { class: "when" }, clock(this.#timeOf(cursor), view.stepS < 60)),
      ...this.#readings().map(([label, text], index) =>
        el(
          "div",
          {},
          el("span", { class: `key k${index}`, "aria-hidden": "true" }),
          `${label} `,
          el("b", {}, text),
        ),
      ),
    );
    const room = this.readout.offsetWidth;
    this.readout.style.left = `${Math.max(0, x > width / 2 ? x - room - 10 : x + 10)}px`;
  }

  #toggle(button) {
    this.values.hidden = !this.values.hidden;
    button.setAttribute("aria-expanded", String(!this.values.hidden));
    if (!this.values.hidden) this.#fillTable();
  }

  #fillTable() {
    const { view, options } = this;
    const every = Math.max(1, Math.ceil(view.size / TABLE_ROWS));
    const rows = [];
    for (let index = view.size - 1; index >= 0 && rows.length < TABLE_ROWS; index -= every) {
      rows.push(
        el(
          "tr",
          {},
          el("th", { scope: "row" }, clock(this.#timeOf(index))),
          view.columns.map((column) =>
            el(
              "td",
              { class: "number" },
              column[index] === null || column[index] === undefined
                ? "–"
                : options.format(column[index]),
            ),
          ),
        ),
      );
    }
    swap(
      this.values,
      el(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": `${options.title}: values` },
        el(
          "table",
          {},
          el("caption", { class: "unseen" }, `${options.title}, newest first`),
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              el("th", { scope: "col" }, "Time"),
              options.series.map(({ label }) => el("th", { scope: "col", class: "number" }, label)),
            ),
          ),
          el("tbody", {}, rows),
        ),
      ),
    );
  }
}

/** Round numbers from 0 to at least `max`, four or five of them. */
export function niceTicks(max) {
  if (!(max > 0)) return [0, 1];
  const raw = max / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10]
    .map((factor) => factor * power)
    .find((value) => value >= raw * 0.999);
  const ticks = [0];
  while (ticks.at(-1) < max * 0.999) ticks.push(Number((ticks.at(-1) + step).toPrecision(12)));
  return ticks;
}
