// The tabs of SLOs, costs and alerts: each asks its own route while it is seen.

import { json } from "./api.js";
import { blank, el, table } from "./dom.js";
import { big, counted, duration, money, moment, number, percent } from "./format.js";
import { costs, incidents, objectives } from "./shapes.js";

const PERIOD_MS = 10_000;

class Report {
  constructor(feed) {
    this.feed = feed;
    this.content = el("div", {}, blank("Loading", null));
    this.element = el("div", {}, el("div", { class: "bar" }, el("h2", {}, new.target.heading)), this.content);
    this.shown = "";
  }

  /** Shown, or the key has changed. */
  async update() {
    clearTimeout(this.timer);
    let doc = null;
    let failure = null;
    try {
      doc = await json(this.path);
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
    if (error.status === 503) return blank("Not available", `${error.message}`);
    return blank("This did not work", error.message, "error");
  }
}

export class Slo extends Report {
  title = "SLOs";
  static heading = "Service level objectives";
  path = "/slo";
  absent = "No objectives are set. Give some with slo.objectives, for example \"p99 ttft < 100 ms\".";

  show(doc) {
    const rows = objectives(doc);
    if (!rows.length) return blank("Not configured", this.absent);
    return el("div", { class: "cards" }, rows.map((one) => el("article", { class: `card slo ${health(one)}` },
      el("header", {}, el("h3", {}, one.name), el("span", { class: `badge b-${health(one)}` }, words[health(one)])),
      one.scope ? el("p", { class: "note" }, one.scope) : null,
      el("dl", { class: "facts" },
        fact("In compliance", percent(one.compliance, 3)),
        one.target !== null ? fact("Target", percent(one.target, 3)) : null,
        one.good !== null ? fact("Good / bad", `${number(one.good)} / ${number(one.bad)}`) : null),
      meter("Error budget left", one.budgetLeft),
      one.burns.length ? el("dl", { class: "facts burns" }, one.burns.map(({ window, rate }) => fact(`Burn, ${window}`, rate === null ? "–" : `${number(rate)}×`))) : null)));
  }
}

export class Costs extends Report {
  title = "Costs";
  static heading = "Costs by tenant";
  path = "/v1/costs";
  absent = "Costs are not kept here. They are with metering.enabled=true and the hardware's price.";

  constructor(feed) {
    super(feed);
    this.usage = el("div", {});
    this.element.append(el("h2", {}, "Tokens by tenant"), this.usage);
    feed.addEventListener("update", () => this.#showUsage());
  }

  async update() {
    this.#showUsage();
    await super.update();
  }

  /** What the observer has counted itself, whether or not anything is priced. */
  #showUsage() {
    const tenants = this.feed.now?.tenants ?? [];
    const shown = JSON.stringify(tenants);
    if (!this.element.isConnected || shown === this.shownUsage) return;
    this.shownUsage = shown;
    const rows = tenants.toSorted((a, b) => b.completion_tokens - a.completion_tokens);
    this.usage.replaceChildren(rows.length
      ? el("div", { class: "card scroll" }, table("Tokens by tenant, since the observer began", [{ label: "Tenant" }, { label: "Requests", number: true }, { label: "Failed", number: true }, { label: "Prompt tokens", number: true }, { label: "Completion tokens", number: true }],
          rows.map((row) => [row.tenant || "(no tenant)", number(row.requests), number(row.bad), big(row.prompt_tokens), big(row.completion_tokens)])))
      : blank("No requests yet", "Counted since the observer began, whether or not costs are kept."));
  }

  show(doc) {
    const { currency, total, rows, lines } = costs(doc);
    if (!rows.length) return blank("Nothing spent yet", "A tenant appears here after its first request.");
    const most = Math.max(...rows.map((row) => row.cost ?? 0)) || 1;
    return el("div", {},
      el("dl", { class: "tiles" }, tile("Requests", money(total, currency), counted(rows.length, "tenant")), lines.map((line) => tile(line.name, money(line.cost, currency), "not charged to anyone"))),
      el("div", { class: "card scroll" }, table("Costs by tenant", [{ label: "Tenant" }, { label: "Cost", number: true }, { label: "Share", wide: true }, { label: "Requests", number: true }, { label: "Prompt tokens", number: true }, { label: "Completion tokens", number: true, wide: true }, { label: "Energy", number: true, wide: true }],
        rows.map((row) => [row.tenant || "(no tenant)", money(row.cost, currency), share(row.cost / most), number(row.requests), big(row.promptTokens), big(row.completionTokens), row.energyJ === null ? "–" : big(row.energyJ, "J")]))));
  }
}

export class Alerts extends Report {
  title = "Alerts";
  static heading = "Alerts";
  path = "/v1/alerts";
  absent = "No alerts are watched for. See the section alerts of the configuration.";

  show(doc) {
    const rows = incidents(doc);
    if (!rows.some((row) => row.open) && !rows.length) return blank("All is quiet", "No incident is open, and none has been of late.", "good");
    const open = rows.filter((row) => row.open).length;
    return el("div", {},
      el("p", { class: "note" }, open ? `${counted(open, "incident")} open.` : "None is open."),
      el("ul", { class: "incidents" }, rows.map((row) => el("li", { class: `card incident ${row.open ? row.severity : "over"}` },
        el("header", {}, el("h3", {}, row.title), el("span", { class: `badge ${row.open ? "b-bad" : "b-good"}` }, row.open ? row.severity : "resolved")),
        row.detail ? el("p", {}, row.detail) : null,
        el("p", { class: "note" }, `Since ${moment(row.sinceS)}${row.endedS ? `, until ${moment(row.endedS)} (${duration(1000 * (row.endedS - row.sinceS))})` : ""}`)))));
  }
}

const words = { good: "within", warn: "budget low", bad: "out of budget", unknown: "no requests yet" };

function health(one) {
  if (one.budgetLeft === null && one.compliance === null) return "unknown";
  if ((one.budgetLeft ?? 1) <= 0 || one.alert === "page" || one.alert === "firing") return "bad";
  return (one.budgetLeft ?? 1) < 0.25 || one.alert ? "warn" : "good";
}

function fact(name, value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value));
}

function tile(label, value, sub) {
  return el("div", { class: "tile" }, el("dt", {}, label), el("dd", { class: "value" }, value), el("dd", { class: "sub" }, sub));
}

function meter(label, value) {
  const fill = el("span", { class: "meter-fill" });
  fill.style.width = `${100 * Math.min(1, Math.max(0, value ?? 0))}%`;
  return el("div", { class: "meter" }, el("span", {}, label), el("b", {}, percent(value)), el("span", { class: "meter-track", "aria-hidden": "true" }, fill));
}

function share(value) {
  const fill = el("span", { class: "meter-fill" });
  fill.style.width = `${100 * Math.min(1, Math.max(0, Number.isFinite(value) ? value : 0))}%`;
  return el("span", { class: "meter-track", "aria-hidden": "true" }, fill);
}
