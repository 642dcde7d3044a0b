// What /slo, /v1/costs and /v1/alerts answer, as the page shows it: the one place that knows those
// documents. A field that is not there is null, and shown as "–".

const list = (value) => (Array.isArray(value) ? value : []);
const first = (...values) => values.find((value) => value !== undefined && value !== null) ?? null;
const asNumber = (value) => {
  const made = typeof value === "string" && value.trim() !== "" ? Number(value) : value;
  return typeof made === "number" && Number.isFinite(made) ? made : null;
};
const asText = (value) => (value === undefined || value === null ? "" : String(value));
const over = (value, by) => (value === null ? null : value / by);
const asTime = (value) => {
  if (typeof value === "string" && Number.isNaN(Number(value))) return over(asNumber(Date.parse(value)), 1000);
  return asNumber(value);
};

/** [{name, scope, compliance, target, budgetLeft (shares), good, bad, burns: [{window, rate}], alert}] */
export function objectives(doc) {
  return list(first(doc?.objectives, doc?.data, doc)).map((one) => ({
    name: asText(first(one.name, one.objective, one.title)),
    scope: scopeOf(one),
    compliance: first(asNumber(one.compliance), over(asNumber(one.compliance_percent), 100)),
    target: first(asNumber(one.target), over(asNumber(one.target_percent), 100)),
    budgetLeft: first(asNumber(one.budget_left), asNumber(one.budget_left_share), over(asNumber(one.budget_left_percent), 100)),
    good: asNumber(one.good),
    bad: asNumber(one.bad),
    burns: burns(first(one.burn_rates, one.burn)),
    alert: asText(first(one.alert, one.severity, one.firing === true ? "firing" : null)),
  }));
}

function burns(value) {
  if (Array.isArray(value)) {
    return value.map((one) => ({ window: asText(first(one.window, one.window_s && `${one.window_s} s`)), rate: asNumber(first(one.rate, one.burn_rate, one.value)) }));
  }
  return Object.entries(value ?? {}).map(([window, rate]) => ({ window, rate: asNumber(rate) }));
}

function scopeOf(one) {
  if (typeof one.scope === "string") return one.scope;
  return Object.entries(one.scope ?? one.labels ?? {}).filter(([, value]) => value !== "" && value !== null).map(([name, value]) => `${name} ${value}`).join(", ");
}

/** {currency, total, rows: [{tenant, cost, requests, promptTokens, completionTokens, energyJ}], lines: [{name, cost}]} */
export function costs(doc) {
  const rows = list(first(doc?.tenants, doc?.data, doc?.rows)).map((one) => ({
    tenant: asText(first(one.tenant, one.name, one.group?.tenant)),
    cost: asNumber(first(one.cost, one.total_cost, one.total)),
    requests: asNumber(first(one.requests, one.num_requests)),
    promptTokens: asNumber(one.prompt_tokens),
    completionTokens: asNumber(one.completion_tokens),
    energyJ: asNumber(one.energy_j),
  })).sort((a, b) => (b.cost ?? 0) - (a.cost ?? 0));
  const totals = first(doc?.totals, typeof doc?.total === "object" ? doc.total : null) ?? {};
  const lines = ["idle", "wasted", "hardware", "energy"].flatMap((name) => {
    const cost = asNumber(first(totals[name], totals[`${name}_cost`], doc?.[name], doc?.[`${name}_cost`]));
    return cost === null ? [] : [{ name, cost }];
  });
  return {
    currency: asText(doc?.currency),
    total: first(asNumber(totals.cost), asNumber(doc?.total), rows.reduce((sum, row) => sum + (row.cost ?? 0), 0)),
    rows,
    lines,
  };
}

/** [{title, detail, severity, open, sinceS, endedS}], open ones first */
export function incidents(doc) {
  return list(first(doc?.incidents, doc?.alerts, doc?.data, doc)).map((one) => {
    const endedS = asTime(first(one.resolved_s, one.resolved_at, one.ended_s, one.ended_at));
    const state = asText(first(one.state, one.status)).toLowerCase();
    return {
      title: asText(first(one.title, one.summary, one.name, one.key, one.dedup_key)),
      detail: asText(first(one.detail, one.description, one.message)),
      severity: asText(one.severity) || "warning",
      open: state ? !["resolved", "closed", "ended"].includes(state) : endedS === null,
      sinceS: asTime(first(one.opened_s, one.started_s, one.began_s, one.since_s, one.opened_at, one.started_at)),
      endedS,
    };
  }).sort((a, b) => Number(b.open) - Number(a.open) || (b.sinceS ?? 0) - (a.sinceS ?? 0));
}

/** {cost, currency} of one answer's usage; null where it tells none */
export function costOf(usage) {
  const told = first(usage?.cost, usage?.cost_details);
  const object = typeof told === "object" && told !== null ? told : {};
  const cost = asNumber(first(object.total, object.cost, typeof told === "object" ? null : told));
  return cost === null ? null : { cost, currency: asText(first(object.currency, usage.cost_currency, usage.currency)) };
}
