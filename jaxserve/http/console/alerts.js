// The tab of incidents.

import { json } from "./api.js";
import { blank, el, table } from "./dom.js";
import { counted, duration, moment, number } from "./format.js";
import { fact, Report } from "./report.js";
import { incidents, receivers } from "./shapes.js";

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
    const told = receivers(doc);
    return el(
      "div",
      {},
      rows.length
        ? this.#list(rows)
        : blank("All is quiet", "No incident is open, and none has been of late.", "good"),
      told.length ? [el("h2", {}, "Who is told"), this.#receivers(told)] : null,
    );
  }

  #list(rows) {
    const open = rows.filter((row) => row.open).length;
    return el(
      "div",
      {},
      el("p", { class: "note" }, open ? `${counted(open, "incident")} open.` : "None is open."),
      el(
        "ul",
        { class: "incidents" },
        rows.map((row) => incident(row)),
      ),
    );
  }

  #receivers(rows) {
    const columns = [
      { label: "Receiver" },
      { label: "Sent", number: true },
      { label: "Waiting", number: true },
      { label: "Failed", number: true },
      { label: "Last error", wide: true },
    ];
    return el(
      "div",
      { class: "card scroll" },
      table(
        "Receivers of alerts",
        columns,
        rows.map((row) => [
          row.name,
          number(row.sent),
          number(row.queued),
          number(row.failed),
          row.error || "–",
        ]),
      ),
    );
  }
}

function incident(row) {
  const lasted = row.endedS ? `, for ${duration(1000 * (row.endedS - row.sinceS))}` : "";
  return el(
    "li",
    { class: `card incident ${row.open ? row.severity : "over"}` },
    el(
      "header",
      {},
      el("h3", {}, row.title),
      el(
        "span",
        { class: `badge ${row.open ? "b-bad" : "b-good"}` },
        row.open ? row.severity : "resolved",
      ),
    ),
    el("p", { class: "note" }, `Since ${moment(row.sinceS)}${lasted}`),
    row.details.length
      ? el(
          "dl",
          { class: "facts" },
          row.details.map(([name, value]) => fact(name, value)),
        )
      : null,
  );
}
