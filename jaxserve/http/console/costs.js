// The tab of costs, and of tokens by tenant.

import { json } from "./api.js";
import { blank, el, swap, table } from "./dom.js";
import { big, counted, money, number } from "./format.js";
import { Report, tile, track } from "./report.js";
import { costPaths, costs } from "./shapes.js";

const DAY_S = 86_400;
const PERIODS = [
  ["24 h", DAY_S],
  ["7 days", 7 * DAY_S],
  ["30 days", 30 * DAY_S],
];

export class Costs extends Report {
  title = "Costs";

  constructor(feed) {
    super(
      "Costs by tenant",
      "Costs are not kept here: see the section metering of the configuration.",
    );
    this.feed = feed;
    this.periodS = PERIODS[0][1];
    this.usage = el("div", {});
    this.bar.append(
      el(
        "div",
        { class: "segments", role: "radiogroup", "aria-label": "Time counted" },
        PERIODS.map(([label, periodS]) =>
          el(
            "label",
            {},
            el("input", {
              type: "radio",
              name: "period",
              checked: periodS === this.periodS,
              onchange: () => {
                this.periodS = periodS;
                this.update();
              },
            }),
            el("span", {}, label),
          ),
        ),
      ),
    );
    this.element.append(el("h2", {}, "Tokens by tenant since the observer began"), this.usage);
    feed.addEventListener("update", () => this.#showUsage());
  }

  async update() {
    this.#showUsage();
    await super.update();
  }

  async ask() {
    const paths = costPaths(Date.now() / 1000 - this.periodS);
    const [byTenant, byLine, usage] = await Promise.all([
      json(paths.byTenant),
      json(paths.byLine),
      json(paths.usage),
    ]);
    return { byTenant, byLine, usage };
  }

  show({ byTenant, byLine, usage }) {
    const { currency, total, rows, lines } = costs(byTenant, byLine, usage);
    if (!rows.length)
      return blank("Nothing spent in this time", "A tenant appears here after its first request.");
    const most = Math.max(...rows.map((row) => row.cost ?? 0)) || 1;
    return el(
      "div",
      {},
      el(
        "dl",
        { class: "tiles few" },
        tile("Charged", money(total, currency), `to ${counted(rows.length, "tenant")}`),
        LINES.flatMap(([name, label, about]) =>
          lines
            .filter((line) => line.name === name)
            .map((line) => tile(label, money(line.cost, currency), about)),
        ),
      ),
      el(
        "div",
        { class: "card scroll" },
        table(
          "Costs by tenant",
          [
            { label: "Tenant" },
            { label: "Cost", number: true },
            { label: "Beside the largest", wide: true },
            { label: "Wasted", number: true, wide: true },
            { label: "Requests", number: true },
            { label: "Input tokens", number: true, wide: true },
            { label: "Output tokens", number: true },
            { label: "Energy", number: true, wide: true },
          ],
          rows.map((row) => [
            row.tenant || "(no tenant)",
            money(row.cost, currency),
            track((row.cost ?? 0) / most),
            row.wasted === null ? "–" : money(row.wasted, currency),
            number(row.requests),
            big(row.inputTokens),
            big(row.outputTokens),
            big(row.energyJ, "J"),
          ]),
        ),
      ),
    );
  }

  /** What the observer has counted itself, whether or not anything is priced. */
  #showUsage() {
    const tenants = this.feed.now?.tenants ?? [];
    const shown = JSON.stringify(tenants);
    if (!this.element.isConnected || shown === this.shownUsage) return;
    this.shownUsage = shown;
    const rows = tenants.toSorted((a, b) => b.completion_tokens - a.completion_tokens);
    swap(
      this.usage,
      rows.length
        ? el(
            "div",
            { class: "card scroll" },
            table(
              "Tokens by tenant",
              [
                { label: "Tenant" },
                { label: "Requests", number: true },
                { label: "Failed", number: true },
                { label: "Prompt", number: true },
                { label: "Output", number: true },
              ],
              rows.map((row) => [
                row.tenant || "(no tenant)",
                number(row.requests),
                number(row.bad),
                big(row.prompt_tokens),
                big(row.completion_tokens),
              ]),
            ),
          )
        : blank("No requests yet", "They are counted here whether or not costs are kept."),
    );
  }
}

// Charged, wasted and idle are together what hardware and energy cost.
const LINES = [
  ["waste", "Wasted", "computed for nothing"],
  ["idle", "Idle", "nobody asked"],
  ["hardware", "Hardware", "the machine's time"],
  ["energy", "Energy", "the machine's power"],
];
