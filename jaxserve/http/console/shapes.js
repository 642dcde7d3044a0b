// What /slo, /v1/costs, /v1/usage and /v1/alerts answer, as the page shows it: the one place that
// knows those documents. What is not there is null or empty, and shown as "–".

const list = (value) => (Array.isArray(value) ? value : []);
const asText = (value) => (value === undefined || value === null ? "" : String(value));
const asNumber = (value) => {
  const made = typeof value === "string" && value.trim() !== "" ? Number(value) : value;
  return typeof made === "number" && Number.isFinite(made) ? made : null;
};
const hundredth = (value) => (asNumber(value) === null ? null : asNumber(value) / 100);

// ---------------------------------------------------------------- /slo

/** [{name, scope, compliance, target, budgetLeft (shares), good, bad, burns: [{window, rate}], alerts: [severity]}] */
export function objectives(doc) {
  return list(doc?.objectives).map((one) => ({
    name: asText(one.name),
    scope: Object.entries(one.scope ?? {})
      .flatMap(([name, value]) => {
        const words = list(value).length
          ? value.join(", ")
          : Array.isArray(value)
            ? ""
            : asText(value);
        return words ? [`${name} ${words}`] : [];
      })
      .join(" · "),
    periodS: asNumber(one.period_s),
    compliance: hundredth(one.compliance_percent),
    target: hundredth(one.target_percent),
    budgetLeft: asNumber(one.budget?.left_share),
    good: asNumber(one.good),
    bad: asNumber(one.bad),
    burns: Object.entries(one.burn_rates ?? {}).map(([window, rate]) => ({
      window,
      rate: asNumber(rate),
    })),
    alerts: Object.entries(one.alerts ?? {})
      .filter(([, firing]) => firing === true)
      .map(([severity]) => severity),
  }));
}

/** Of the last five minutes: {share, requestsPerS, tokensPerS}; null where it is not told. */
export function goodput(doc) {
  const told = doc?.goodput?.["5m"];
  return told
    ? {
        share: asNumber(told.share),
        requestsPerS: asNumber(told.requests_per_s),
        tokensPerS: asNumber(told.tokens_per_s),
      }
    : null;
}

// ---------------------------------------------------------------- /v1/costs, /v1/usage

/** Where the costs since a time (seconds since 1970) are: by tenant, by line, and usage by tenant. */
export function costPaths(fromS) {
  const when = `interval=all&from=${Math.floor(fromS)}`;
  return {
    byTenant: `/v1/costs?group_by=tenant&${when}`,
    byLine: `/v1/costs?group_by=line_item&${when}`,
    usage: `/v1/usage?group_by=tenant&${when}`,
  };
}

const results = (doc) => list(doc?.data).flatMap((bucket) => list(bucket?.results));

/** {currency, total, rows: [{tenant, cost, wasted, requests, inputTokens, outputTokens, energyJ}], lines: [{name, cost}]} */
export function costs(byTenant, byLine, usage) {
  const used = new Map(results(usage).map((one) => [asText(one.tenant), one]));
  const rows = results(byTenant)
    .map((one) => {
      const tokens = used.get(asText(one.tenant));
      return {
        tenant: asText(one.tenant),
        cost: asNumber(one.amount?.value),
        wasted: asNumber(one.wasted),
        requests: asNumber(one.num_model_requests),
        inputTokens: asNumber(tokens?.input_tokens),
        outputTokens: asNumber(tokens?.output_tokens),
        energyJ: asNumber(tokens?.energy_j),
      };
    })
    .sort((a, b) => (b.cost ?? 0) - (a.cost ?? 0));
  const lines = results(byLine).map((one) => ({
    name: asText(one.line_item),
    cost: asNumber(one.amount?.value),
  }));
  const first = [...results(byTenant), ...results(byLine)].find((one) => one.amount?.currency);
  return {
    currency: asText(first?.amount.currency).toUpperCase(),
    total: rows.reduce((sum, row) => sum + (row.cost ?? 0), 0),
    rows,
    lines,
  };
}

// ---------------------------------------------------------------- /v1/alerts

/** [{title, details: [[name, value]], severity, open, sinceS, endedS}], open ones first */
export function incidents(doc) {
  const read = (one, open) => ({
    title: asText(one.title ?? one.key),
    details: Object.entries(one.details ?? {}).map(([name, value]) => [name, asText(value)]),
    severity: asText(one.severity) || "warning",
    open,
    sinceS: asNumber(one.started_at),
    endedS: asNumber(one.ended_at) || null,
  });
  const newest = (a, b) => (b.sinceS ?? 0) - (a.sinceS ?? 0);
  return [
    ...list(doc?.open)
      .map((one) => read(one, true))
      .sort(newest),
    ...list(doc?.recent)
      .map((one) => read(one, false))
      .filter((one) => one.endedS !== null)
      .sort(newest),
  ];
}

/** Who is told: [{name, queued, sent, failed, error}] */
export function receivers(doc) {
  return list(doc?.receivers).map((one) => ({
    name: asText(one.name),
    queued: asNumber(one.queued),
    sent: asNumber(one.sent),
    failed: asNumber(one.failed),
    error: asText(one.error),
  }));
}

// ---------------------------------------------------------------- usage of one answer

/** {cost, currency} of an answer's `usage`; null where it tells none. */
export function costOf(usage) {
  const told = usage?.cost;
  const object = typeof told === "object" && told !== null ? told : { total: told };
  const cost = asNumber(object.total ?? object.value);
  return cost === null
    ? null
    : { cost, currency: asText(object.currency ?? usage.currency).toUpperCase() };
}
