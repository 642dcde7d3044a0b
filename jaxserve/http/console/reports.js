// The tabs of SLOs, costs and alerts: each asks its own routes while it is seen.

import { json } from "./api.js";
import { blank, el, table } from "./dom.js";
import { big, counted, duration, money, moment, number, percent } from "./format.js";
import { costPaths, costs, goodput, incidents, objectives } from "./shapes.js";

const PERIOD_MS = 10_000;
const DAY_S = 86_400;

class Report {
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
    this.timer = setTimeout(() => { if (this.element.isConnected) this.update(); }, PERIOD_MS);
    const shown = failure ? `${failure.status} ${failure.message}` : JSON.stringify(doc);
    if (shown === this.shown) return;
    this.shown = shown;
    this.content.replaceChildren(failure ? this.#refused(failure) : this.show(doc));
  }

  #refused(error) {
    if (error.status === 401) return blank("A key is needed", "Enter a key above.");
    if (error.status === 403) return blank("This key is not an admin's", error.message);
    if (error.status === 404) return blank("Not configured", this.absent);
    if (error.status === 503) return blank("Not available", error.message);
    return blank("This did not work", error.message, "error");
  }
}

// ---------------------------------------------------------------- SLOs

const HEALTH = { good: "within", warn: "at risk", bad: "out of budget", unknown: "no requests yet" };

export class Slo extends Report {
  title = "SLOs";

  constructor() {
    super("Service level objectives", "No objectives are set. Give some with slo.objectives, for example \"p99 ttft < 100 ms\".");
  }

  ask() {
    return json("/slo");
  }

  show(doc) {
    const rows = objectives(doc);
    if (!rows.length) return blank("Not configured", this.absent);
    const good = goodput(doc);
    return el("div", {},
      good ? el("dl", { class: "tiles few" },
        tile("Goodput", percent(good.share), "of requests, 5 min"), tile("Good requests", number(good.requestsPerS), "/s, 5 min"), tile("Good tokens", big(good.tokensPerS), "/s, 5 min"),
        tile("Objectives met", `${rows.filter((one) => health(one) === "good" || health(one) === "warn").length} of ${rows.length}`, "")) : null,
      el("div", { class: "cards" }, rows.map((one) => objective(one))));
  }
}

function objective(one) {
  const state = health(one);
  return el("article", { class: `card slo ${state}` },
    el("header", {}, el("h3", {}, one.name), el("span", { class: `badge b-${state}` }, HEALTH[state])),
    one.scope ? el("p", { class: "note" }, one.scope) : null,
    el("dl", { class: "facts" },
      fact("In compliance", percent(one.compliance, 3)), fact("Target", percent(one.target, 3)),
      fact("Good", number(one.good)), fact("Bad", number(one.bad)),
      one.periodS ? fact("Over", one.periodS >= DAY_S ? counted(one.periodS / DAY_S, "day") : duration(1000 * one.periodS)) : null),
    meter("Error budget left", one.budgetLeft),
    one.burns.length ? el("div", { class: "burns" }, el("p", { class: "note" }, "Burn rate"), el("dl", { class: "facts" }, one.burns.map(({ window, rate }) => fact(window, rate === null ? "–" : `${number(rate)}×`)))) : null,
    one.alerts.length ? el("p", { class: "error-text" }, `Alerting: ${one.alerts.join(", ")}`) : null);
}

function health(one) {
  if (one.compliance === null) return "unknown";
  if ((one.budgetLeft ?? 1) < 0) return "bad";
  return (one.budgetLeft ?? 1) < 0.25 || one.alerts.length ? "warn" : "good";
}

// ---------------------------------------------------------------- costs

const PERIODS = [["24 h", DAY_S], ["7 days", 7 * DAY_S], ["30 days", 30 * DAY_S]];

export class Costs extends Report {
  title = "Costs";

  constructor(feed) {
    super("Costs by tenant", "Costs are not kept here: see the section metering of the configuration.");
    this.feed = feed;
    this.periodS = PERIODS[0][1];
    this.usage = el("div", {});
    this.bar.append(el("div", { class: "segments", role: "radiogroup", "aria-label": "Time counted" }, PERIODS.map(([label, periodS]) =>
      el("label", {}, el("input", { type: "radio", name: "period", checked: periodS === this.periodS, onchange: () => { this.periodS = periodS; this.update(); } }), el("span", {}, label)))));
    this.element.append(el("h2", {}, "Tokens by tenant since the observer began"), this.usage);
    feed.addEventListener("update", () => this.#showUsage());
  }

  async update() {
    this.#showUsage();
    await super.update();
  }

  async ask() {
    const paths = costPaths(Date.now() / 1000 - this.periodS);
    const [byTenant, byLine, usage] = await Promise.all([json(paths.byTenant), json(paths.byLine), json(paths.usage)]);
    return { byTenant, byLine, usage };
  }

  show({ byTenant, byLine, usage }) {
    const { currency, total, rows, lines } = costs(byTenant, byLine, usage);
    if (!rows.length) return blank("Nothing spent in this time", "A tenant appears here after its first request.");
    const most = Math.max(...rows.map((row) => row.cost ?? 0)) || 1;
    return el("div", {},
      el("dl", { class: "tiles few" }, tile("Charged", money(total, currency), `to ${counted(rows.length, "tenant")}`), LINES.flatMap(([name, label, about]) => lines.filter((line) => line.name === name).map((line) => tile(label, money(line.cost, currency), about)))),
      el("div", { class: "card scroll" }, table("Costs by tenant",
        [{ label: "Tenant" }, { label: "Cost", number: true }, { label: "Beside the largest", wide: true }, { label: "Wasted", number: true, wide: true }, { label: "Requests", number: true }, { label: "Input tokens", number: true, wide: true }, { label: "Output tokens", number: true }, { label: "Energy", number: true, wide: true }],
        rows.map((row) => [row.tenant || "(no tenant)", money(row.cost, currency), track((row.cost ?? 0) / most), row.wasted === null ? "–" : money(row.wasted, currency), number(row.requests), big(row.inputTokens), big(row.outputTokens), big(row.energyJ, "J")]))));
  }

  /** What the observer has counted itself, whether or not anything is priced. */
  #showUsage() {
    const tenants = this.feed.now?.tenants ?? [];
    const shown = JSON.stringify(tenants);
    if (!this.element.isConnected || shown === this.shownUsage) return;
    this.shownUsage = shown;
    const rows = tenants.toSorted((a, b) => b.completion_tokens - a.completion_tokens);
    this.usage.replaceChildren(rows.length
      ? el("div", { class: "card scroll" }, table("Tokens by tenant", [{ label: "Tenant" }, { label: "Requests", number: true }, { label: "Failed", number: true }, { label: "Prompt", number: true }, { label: "Output", number: true }],
          rows.map((row) => [row.tenant || "(no tenant)", number(row.requests), number(row.bad), big(row.prompt_tokens), big(row.completion_tokens)])))
      : blank("No requests yet", "They are counted here whether or not costs are kept."));
  }
}

// Charged, wasted and idle are together what hardware and energy cost.
const LINES = [["waste", "Wasted", "computed for nothing"], ["idle", "Idle", "nobody asked"], ["hardware", "Hardware", "the machine's time"], ["energy", "Energy", "the machine's power"]];

// ---------------------------------------------------------------- alerts

export class Alerts extends Report {
  title = "Alerts";

  constructor() {
    super("Alerts", "No alerts are watched for: see the section alerts of the configuration.");
  }

  ask() {
    return json("/v1/alerts");
  }

  show(doc) {
    const rows = incidents(doc);
    if (!rows.length) return blank("All is quiet", "No incident is open, and none has been of late.", "good");
    const open = rows.filter((row) => row.open).length;
    return el("div", {},
      el("p", { class: "note" }, open ? `${counted(open, "incident")} open.` : "None is open."),
      el("ul", { class: "incidents" }, rows.map((row) => el("li", { class: `card incident ${row.open ? row.severity : "over"}` },
        el("header", {}, el("h3", {}, row.title), el("span", { class: `badge ${row.open ? "b-bad" : "b-good"}` }, row.open ? row.severity : "resolved")),
        el("p", { class: "note" }, `Since ${moment(row.sinceS)}${row.endedS ? `, for ${duration(1000 * (row.endedS - row.sinceS))}` : ""}`),
        row.details.length ? el("dl", { class: "facts" }, row.details.map(([name, value]) => fact(name, value))) : null))));
  }
}

// ---------------------------------------------------------------- pieces

function fact(name, value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value));
}

function tile(label, value, sub) {
  return el("div", { class: "tile" }, el("dt", {}, label), el("dd", { class: "value" }, value), el("dd", { class: "sub" }, sub));
}

function meter(label, value) {
  return el("div", { class: "meter" }, el("span", {}, label), el("b", {}, percent(value)), track(value));
}

function track(value) {
  const fill = el("span", { class: "meter-fill" });
  fill.style.width = `${100 * Math.min(1, Math.max(0, Number.isFinite(value) ? value : 0))}%`;
  return el("span", { class: "meter-track", "aria-hidden": "true" }, fill);
}
