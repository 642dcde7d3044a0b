// The first tab: what the server does now, as numbers and lines.

import { LineChart } from "./chart.js";
import { blank, el, say } from "./dom.js";
import { big, counted, duration, number, percent, moment } from "./format.js";

const RANGES = [
  { label: "5 min", step: 1, points: 300 },
  { label: "15 min", step: 1, points: 900 },
  { label: "1 h", step: 60, points: 60 },
  { label: "24 h", step: 60, points: 1440 },
];
const rate = (value) => big(value);
const quantiles = (name) =>
  [50, 95, 99].map((share) => ({ name: `${name}_p${share}`, label: `p${share}` }));

const CHARTS = [
  {
    title: "Throughput, tokens/s",
    about: "Tokens decoded, and prompt tokens computed, a second.",
    series: [
      { name: "decode_tokens", label: "decoded" },
      { name: "prefill_tokens", label: "prefilled" },
    ],
    format: rate,
  },
  {
    title: "Requests/s",
    about: "Requests that ended, and those that failed, were shed or came too late.",
    series: [
      { name: "requests", label: "ended" },
      { name: "bad", label: "failed" },
      { name: "limited", label: "rate-limited" },
    ],
    format: rate,
  },
  {
    title: "Time to first token",
    about: "From arrival to the first token.",
    series: quantiles("ttft"),
    format: duration,
    empty: "No first tokens in this time",
    headline: 1,
  },
  {
    title: "Time per output token",
    about: "After the first token.",
    series: quantiles("tpot"),
    format: duration,
    empty: "No tokens after a first one in this time",
    headline: 1,
  },
  {
    title: "Request duration",
    about: "From arrival to the last byte, of requests that were answered.",
    series: quantiles("total"),
    format: duration,
    empty: "No answers in this time",
    headline: 1,
  },
  {
    title: "Queue, sequences",
    about: "The most sequences running and waiting at once.",
    series: [
      { name: "running", label: "running" },
      { name: "waiting", label: "waiting" },
    ],
    format: number,
    max: 4,
  },
  {
    title: "KV pages",
    about: "Pages in use, and those kept for reuse.",
    series: [
      { name: "pages_used_share", label: "in use" },
      { name: "pages_cached_share", label: "cached" },
    ],
    format: percent,
    max: 1,
  },
  {
    title: "Step time",
    about: "Device time of a step, on average.",
    series: [{ name: "step_ms", label: "step" }],
    format: duration,
    empty: "No steps in this time",
  },
  {
    title: "Batch",
    about: "Sequences in a step, on average.",
    series: [{ name: "rows", label: "rows" }],
    format: number,
    max: 4,
    empty: "No steps in this time",
  },
  {
    title: "Device busy",
    about: "Share of the time in which the device worked.",
    series: [{ name: "busy", label: "busy" }],
    format: percent,
    max: 1,
  },
  {
    title: "Compute, FLOP/s",
    about: "Floating-point operations a second, counted from shapes.",
    series: [{ name: "flops", label: "compute" }],
    format: (value) => big(value, "FLOP/s"),
    tick: rate,
    share: { peak: "flops", label: "MFU" },
    empty: "The engine counts no operations",
  },
  {
    title: "Memory traffic, B/s",
    about: "Bytes moved a second, counted from shapes.",
    series: [{ name: "bytes", label: "traffic" }],
    format: (value) => big(value, "B/s"),
    tick: rate,
    share: { peak: "bytes", label: "MBU" },
    empty: "The engine counts no bytes",
  },
];

export class Overview {
  title = "Overview";

  constructor(feed) {
    this.feed = feed;
    this.range = RANGES[0];
    this.tiles = el("dl", { class: "tiles" });
    this.state = el("div", {});
    this.charts = CHARTS.map((options) => new LineChart(options));
    this.news = el("div", {});
    const ranges = el(
      "div",
      { class: "segments", role: "radiogroup", "aria-label": "Time shown" },
      RANGES.map((range) =>
        el(
          "label",
          {},
          el("input", {
            type: "radio",
            name: "range",
            checked: range === this.range,
            onchange: () => this.#choose(range),
          }),
          el("span", {}, range.label),
        ),
      ),
    );
    this.body = el(
      "div",
      {},
      this.tiles,
      el("div", { class: "bar" }, el("h2", {}, "Live"), ranges),
      el(
        "div",
        { class: "charts" },
        this.charts.map((chart) => chart.element),
      ),
      this.news,
    );
    this.element = el("div", {}, this.state, this.body);
    feed.addEventListener("update", () => this.update());
  }

  #choose(range) {
    this.range = range;
    this.feed.choose(range.step);
    this.update();
  }

  update() {
    const { feed } = this;
    const message = without(feed);
    this.body.hidden = !feed.now;
    this.state.replaceChildren(...(message && !feed.now ? [message] : []));
    if (!feed.now) return;
    this.#fillTiles(feed.now);
    const series = withShares(feed.series);
    const shown = series && series.stepS === this.range.step ? series : null;
    this.charts.forEach((chart) =>
      chart.update(shown, this.range.points, shareNote(chart.options.share, shown, feed.now.peaks)),
    );
    this.#fillNews(feed.now.news);
  }

  #fillTiles(now) {
    const columns = this.feed.series?.columns ?? {};
    const recent = this.feed.series?.stepS === 60 ? 1 : 10;
    const mean = (name) => {
      const own = (columns[name] ?? []).slice(-recent).filter((value) => value !== null);
      return own.length ? own.reduce((sum, value) => sum + value, 0) / own.length : null;
    };
    const last = (name) =>
      (columns[name] ?? []).slice(-60).findLast((value) => value !== null) ?? null;
    const engine = now.engine;
    const { bad, requests } = totals(now.tenants);
    const tiles = [
      ["Decoded", big(mean("decode_tokens")), "tokens/s"],
      ["Requests", big(mean("requests")), "/s"],
      ["TTFT p95", duration(last("ttft_p95")), "of late"],
      ["TPOT p95", duration(last("tpot_p95")), "of late"],
      [
        "Running",
        engine ? number(engine.running) : "–",
        engine?.max_rows ? `of ${engine.max_rows} rows` : "",
      ],
      [
        "Waiting",
        engine ? number(engine.waiting) : "–",
        engine?.swapped ? `${engine.swapped} swapped` : "in queue",
      ],
      [
        "KV pages",
        engine?.pages_total ? percent(engine.pages_used / engine.pages_total) : "–",
        engine?.pages_total ? `of ${big(engine.pages_total)}` : "",
      ],
      [
        "Prefix hits",
        engine?.prefix_lookup_tokens
          ? percent(engine.prefix_hit_tokens / engine.prefix_lookup_tokens)
          : "–",
        "of prompts",
      ],
      ["Failed", requests ? percent(bad / requests, 2) : "–", `of ${counted(requests, "request")}`],
    ];
    if (this.tiles.children.length !== tiles.length) {
      this.tiles.replaceChildren(
        ...tiles.map(([label]) =>
          el(
            "div",
            { class: "tile" },
            el("dt", {}, label),
            el("dd", { class: "value" }),
            el("dd", { class: "sub" }),
          ),
        ),
      );
    }
    tiles.forEach(([, value, sub], index) => {
      say(this.tiles.children[index].children[1], value);
      say(this.tiles.children[index].children[2], sub);
    });
  }

  #fillNews(news) {
    const shown = news.map((item) => `${moment(item.at_s)} ${item.kind} ${item.subject}`).join();
    if (shown === this.shownNews) return;
    this.shownNews = shown;
    const words = {
      engine_down: "Engine ended",
      engine_started: "Engine started again",
      engine_failed: "Engine given up",
      deployed: "Deployed",
      configured: "Configured",
    };
    this.news.replaceChildren(
      ...(news.length
        ? [
            el("h2", {}, "Events"),
            el(
              "ul",
              { class: "news card" },
              news
                .toReversed()
                .map((item) =>
                  el(
                    "li",
                    {},
                    el("time", {}, moment(item.at_s)),
                    el("strong", {}, words[item.kind] ?? item.kind.replaceAll("_", " ")),
                    el("span", {}, item.subject),
                  ),
                ),
            ),
          ]
        : []),
    );
  }
}

/** What to show in place of live numbers; null where there are some. */
export function without(feed) {
  switch (feed.state) {
    case "live":
      return null;
    case "waiting":
      return blank("Loading", "Asking the server what it is doing.");
    case "key":
      return blank(
        "A key is needed",
        "This server has a key file. Enter a key of the admin role above to see its numbers.",
      );
    case "forbidden":
      return blank(
        "This key is not an admin's",
        "It may chat, but not see what belongs to all. Enter a key of the admin role above.",
      );
    case "down":
      return blank(
        "Disconnected",
        "The server cannot be reached. The page tries again by itself.",
        "error",
      );
    default:
      return blank("Nothing is observed", feed.error, "error");
  }
}

function totals(tenants) {
  return tenants.reduce(
    (sum, tenant) => ({ bad: sum.bad + tenant.bad, requests: sum.requests + tenant.requests }),
    { bad: 0, requests: 0 },
  );
}

/** Pages as shares of all pages; FLOPs and bytes as nothing where the engine counts none. */
function withShares(series) {
  if (!series) return null;
  const { columns } = series;
  const share = (name) =>
    (columns[name] ?? []).map((value, index) => {
      const total = columns.pages_total[index];
      return value === null || !total ? null : value / total;
    });
  const counted = (name) => ((columns[name] ?? []).some((value) => value) ? columns[name] : []);
  return {
    ...series,
    columns: {
      ...columns,
      pages_used_share: share("pages_used"),
      pages_cached_share: share("pages_cached"),
      flops: counted("flops"),
      bytes: counted("bytes"),
    },
  };
}

/** " · MFU 31 %" behind a value, where the device's peak is known. */
function shareNote(share, series, peaks) {
  if (!share || !series || !peaks?.[share.peak]) return "";
  const value = series.columns[share.peak].findLast((one) => one !== null);
  return value === undefined ? "" : ` · ${share.label} ${percent(value / peaks[share.peak])}`;
}
