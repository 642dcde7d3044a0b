// Numbers with their units, as people read them.

const THIN = "\u202f";

/** About three significant digits: 0.123, 12.3, 1,234. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const digits = size === 0 || size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

/** 1.2k, 3.4M, 5.6G with a unit behind it. */
export function big(value, unit = "") {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  for (const [factor, prefix] of [
    [1e15, "P"],
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (Math.abs(value) >= factor * 0.9995)
      return `${number(value / factor)}${THIN}${prefix}${unit}`;
  }
  return unit ? `${number(value)}${THIN}${unit}` : number(value);
}

/** Milliseconds as µs, ms, s or min. */
export function duration(ms) {
  if (ms === null || ms === undefined || !Number.isFinite(ms)) return "–";
  const size = Math.abs(ms);
  if (size === 0) return `0${THIN}ms`;
  if (size < 1) return `${number(ms * 1000)}${THIN}µs`;
  if (size < 1000) return `${number(ms)}${THIN}ms`;
  if (size < 120_000) return `${number(ms / 1000)}${THIN}s`;
  if (size < 7_200_000) return `${number(ms / 60_000)}${THIN}min`;
  return `${number(ms / 3_600_000)}${THIN}h`;
}

/** A share between 0 and 1 as percent. */
export function percent(share, digits = 1) {
  if (share === null || share === undefined || !Number.isFinite(share)) return "–";
  return `${(share * 100).toLocaleString("en", { maximumFractionDigits: digits })}${THIN}%`;
}

/** Money: small amounts keep the digits that say something. */
export function money(value, currency = "") {
  const amount = typeof value === "string" ? Number(value) : value;
  if (amount === null || amount === undefined || !Number.isFinite(amount)) return "–";
  const digits =
    amount !== 0 && Math.abs(amount) < 0.1
      ? { maximumSignificantDigits: 3 }
      : { minimumFractionDigits: 2, maximumFractionDigits: 2 };
  const text = amount.toLocaleString("en", { maximumFractionDigits: 20, ...digits });
  return currency ? `${text}${THIN}${currency}` : text;
}

/** A wall-clock time (seconds since 1970) in the reader's zone. */
export function clock(atS, seconds = true) {
  if (!Number.isFinite(atS)) return "–";
  return new Date(atS * 1000).toLocaleTimeString("en-GB", {
    hour: "2-digit",
    minute: "2-digit",
    ...(seconds ? { second: "2-digit" } : {}),
  });
}

/** Date and time. */
export function moment(atS) {
  if (!Number.isFinite(atS)) return "–";
  return new Date(atS * 1000).toLocaleString("en-GB", {
    day: "2-digit",
    month: "short",
    hour: "2-digit",
    minute: "2-digit",
    second: "2-digit",
  });
}

/** A count with its noun: "1 request", "2 requests". */
export function counted(value, noun) {
  return `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
}
