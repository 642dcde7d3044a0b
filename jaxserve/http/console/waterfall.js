// A request's time, a row for each stretch: the table is the picture.

import { el } from "./dom.js";
import { duration, number, percent } from "./format.js";

const ABOUT = {
  receive: "head and body",
  admit: "limits and rights",
  tokenize: "template, tokens",
  queue: "waits for a row",
  prefill: "to its first token",
  decode: "to its last token",
  detokenize: "text, last byte",
};

/** The element for a document of /console/request. */
export function waterfall(doc) {
  const total = Math.max(doc.total_ms, 0.001);
  const lanes = new Set(doc.bars.map((bar) => bar.lane));
  const rows = doc.bars.map((bar) => {
    const piece = el("span", { class: `bar-piece w-${bar.name in ABOUT ? bar.name : "other"}` });
    piece.style.left = `${Math.min(99.6, (100 * bar.start_ms) / total)}%`;
    piece.style.width = `${Math.max(0.4, (100 * (bar.end_ms - bar.start_ms)) / total)}%`;
    return el(
      "tr",
      { class: bar.depth ? "inner" : null },
      el(
        "th",
        { scope: "row", title: ABOUT[bar.name] },
        lanes.size > 1 && bar.lane !== "request" ? `${bar.name} (${bar.lane})` : bar.name,
      ),
      el("td", { class: "track-cell" }, el("span", { class: "track" }, piece)),
      el("td", { class: "number" }, duration(bar.end_ms - bar.start_ms)),
    );
  });
  const facts = [
    ["Total", duration(doc.total_ms)],
    ["TTFT", duration(doc.ttft_ms)],
    ["Prompt", `${number(doc.prompt_tokens)} tokens`],
    doc.cached_tokens ? ["Cached", `${number(doc.cached_tokens)} tokens`] : null,
    ["Completion", `${number(doc.completion_tokens)} tokens`],
    doc.preemptions ? ["Preempted", `${doc.preemptions}×`] : null,
    doc.replays ? ["Replayed", `${doc.replays}×`] : null,
    ["Outcome", doc.outcome],
    doc.tenant ? ["Tenant", doc.tenant] : null,
    doc.adapter ? ["Adapter", doc.adapter] : null,
    doc.trace_id ? ["Trace", doc.trace_id] : null,
    ["Covered", percent(doc.covered, 2)],
  ].filter(Boolean);
  return el(
    "div",
    { class: "waterfall" },
    el(
      "table",
      {},
      el("caption", { class: "unseen" }, `Where the time of request ${doc.id} went`),
      el(
        "thead",
        { class: "unseen" },
        el(
          "tr",
          {},
          el("th", { scope: "col" }, "Stretch"),
          el("th", { scope: "col" }, "When"),
          el("th", { scope: "col" }, "Took"),
        ),
      ),
      el("tbody", {}, rows),
    ),
    doc.error ? el("p", { class: "error-text" }, `${doc.error_code}: ${doc.error}`) : null,
    el(
      "dl",
      { class: "facts" },
      facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    ),
    el("p", { class: "note" }, "Request ", el("code", {}, doc.id)),
  );
}
