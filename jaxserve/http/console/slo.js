// The tab of service level objectives.

import { json } from "./api.js";
import { blank, el } from "./dom.js";
import { big, counted, duration, number, percent } from "./format.js";
import { fact, meter, Report, tile } from "./report.js";
import { goodput, objectives } from "./shapes.js";

const DAY_S = 86_400;
const HEALTH = {
  good: "within",
  warn: "at risk",
  bad: "out of budget",
  unknown: "no requests yet",
};

export class Slo extends Report {
  title = "SLOs";

  constructor() {
    super(
      "Service level objectives",
      'No objectives are set. Give some with slo.objectives, for example "p99 ttft < 100 ms".',
    );
  }

  ask() {
    return json("/slo");
  }

  show(doc) {
    const rows = objectives(doc);
    if (!rows.length) return blank("Not configured", this.absent);
    const good = goodput(doc);
    return el(
      "div",
      {},
      good
        ? el(
            "dl",
            { class: "tiles few" },
            tile("Goodput", percent(good.share), "of requests, 5 min"),
            tile("Good requests", number(good.requestsPerS), "/s, 5 min"),
            tile("Good tokens", big(good.tokensPerS), "/s, 5 min"),
            tile(
              "Objectives met",
              `${rows.filter((one) => health(one) === "good" || health(one) === "warn").length} of ${rows.length}`,
              "",
            ),
          )
        : null,
      el(
        "div",
        { class: "cards" },
        rows.map((one) => objective(one)),
      ),
    );
  }
}

function objective(one) {
  const state = health(one);
  return el(
    "article",
    { class: `card slo ${state}` },
    el(
      "header",
      {},
      el("h3", {}, one.name),
      el("span", { class: `badge b-${state}` }, HEALTH[state]),
    ),
    one.scope ? el("p", { class: "note" }, one.scope) : null,
    el(
      "dl",
      { class: "facts" },
      fact("In compliance", percent(one.compliance, 3)),
      fact("Target", percent(one.target, 3)),
      fact("Good", number(one.good)),
      fact("Bad", number(one.bad)),
      one.periodS
        ? fact(
            "Over",
            one.periodS >= DAY_S
              ? counted(one.periodS / DAY_S, "day")
              : duration(1000 * one.periodS),
          )
        : null,
    ),
    meter("Error budget left", one.budgetLeft),
    one.burns.length
      ? el(
          "div",
          { class: "burns" },
          el("p", { class: "note" }, "Burn rate"),
          el(
            "dl",
            { class: "facts" },
            one.burns.map(({ window, rate }) =>
              fact(window, rate === null ? "–" : `${number(rate)}×`),
            ),
          ),
        )
      : null,
    one.alerts.length
      ? el("p", { class: "error-text" }, `Alerting: ${one.alerts.join(", ")}`)
      : null,
  );
}

function health(one) {
  if (one.compliance === null) return "unknown";
  if ((one.budgetLeft ?? 1) < 0) return "bad";
  return (one.budgetLeft ?? 1) < 0.25 || one.alerts.length ? "warn" : "good";
}
