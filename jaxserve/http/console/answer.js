// One answer of the chat: its text as it comes, its tokens' probabilities, what it took.

import { el } from "./dom.js";
import { duration, money, number, percent } from "./format.js";
import { costOf } from "./shapes.js";

const UNSURE = 0.9;
const DOUBTFUL = 0.5;

export class Answer {
  /** @param {Tip} tip where tokens' alternatives are shown; one for the page. */
  constructor(tip) {
    this.tip = tip;
    this.content = "";
    this.thought = "";
    this.entries = []; // of each span: [{token, logprob, bytes, top_logprobs}]
    this.waiting = []; // entries whose text is still held back
    this.startedMs = performance.now();
    this.firstMs = 0;
    this.text = el("div", { class: "text" });
    this.caret = el("span", { class: "caret", "aria-hidden": "true" });
    this.thinking = el(
      "details",
      { class: "thinking", hidden: true },
      el("summary", {}, "Reasoning"),
      el("div", { class: "text" }),
    );
    this.error = el("p", { class: "error-text", role: "alert", hidden: true });
    this.meta = el("p", { class: "meta" });
    this.time = el(
      "details",
      { class: "time", hidden: true },
      el("summary", {}, "Where the time went"),
    );
    this.element = el(
      "article",
      { class: "turn assistant", "aria-label": "Answer", "aria-busy": "true" },
      el("p", { class: "who" }, "Assistant"),
      this.thinking,
      el("div", { class: "said" }, this.text, this.caret),
      this.error,
      this.meta,
      this.time,
    );
    this.text.addEventListener("pointerover", (event) => this.#show(event.target));
    this.text.addEventListener("pointerleave", () => this.tip.hide());
    this.text.addEventListener("focusout", () => this.#pick(null));
    this.text.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Takes one chunk of the stream. */
  add(chunk) {
    const choice = chunk.choices?.[0];
    if (chunk.usage) this.usage = chunk.usage;
    if (!choice) return;
    const { delta = {} } = choice;
    if (!this.firstMs && (delta.content || delta.reasoning_content))
      this.firstMs = performance.now();
    if (delta.reasoning_content) {
      this.thought += delta.reasoning_content;
      this.thinking.hidden = false;
      this.thinking.lastChild.append(delta.reasoning_content);
    }
    if (choice.logprobs?.content) this.waiting.push(...choice.logprobs.content);
    if (delta.content) this.#append(delta.content);
    if (choice.finish_reason) this.finish = choice.finish_reason;
  }

  #append(content) {
    this.content += content;
    const entries = this.waiting.splice(0);
    if (!entries.length) {
      this.text.append(content);
      return;
    }
    // A character may be several tokens, and text may be held back: where the tokens of this piece
    // do not spell it one by one, they share one span.
    const decoder = new TextDecoder();
    const pieces = entries.map((entry) =>
      decoder.decode(Uint8Array.from(entry.bytes ?? []), { stream: true }),
    );
    if (pieces.join("") === content) {
      let held = [];
      pieces.forEach((piece, index) => {
        held.push(entries[index]);
        if (!piece) return;
        this.#span(piece, held);
        held = [];
      });
      if (held.length) this.waiting = held;
    } else this.#span(content, entries);
  }

  #span(text, entries) {
    const sure = Math.min(...entries.map((entry) => Math.exp(entry.logprob)));
    const level = sure < DOUBTFUL ? "doubtful" : sure < UNSURE ? "unsure" : "sure";
    this.text.append(
      el("span", { class: `token ${level}`, dataset: { at: this.entries.length } }, text),
    );
    this.entries.push(entries);
    if (this.entries.length === 1) {
      this.text.tabIndex = 0;
      this.text.setAttribute("role", "group");
      this.text.setAttribute("aria-label", "Answer; arrow keys read its tokens");
    }
  }

  #show(target) {
    const at = target.dataset?.at;
    if (at === undefined) this.tip.hide();
    else this.tip.show(target, this.entries[at]);
  }

  #key(event) {
    const tokens = this.text.querySelectorAll(".token");
    const at = this.picked ? Number(this.picked.dataset.at) : -1;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[
      event.key
    ];
    if (event.key === "Escape") this.#pick(null);
    if (to === undefined || !tokens.length) return;
    event.preventDefault();
    this.#pick(tokens[Math.min(tokens.length - 1, Math.max(0, to))]);
  }

  #pick(token) {
    this.picked?.classList.remove("picked");
    this.picked = token;
    if (!token) {
      this.tip.hide();
      return;
    }
    token.classList.add("picked");
    token.scrollIntoView({ block: "nearest" });
    this.tip.show(token, this.entries[token.dataset.at]);
  }

  /** No more comes. @param {{error?: Error, stopped?: boolean}} how */
  end({ error, stopped } = {}) {
    this.caret.remove();
    this.element.setAttribute("aria-busy", "false");
    if (error) {
      this.error.hidden = false;
      const code = error.code
        ? ` (${[error.status || null, error.code, error.param].filter(Boolean).join(", ")})`
        : "";
      this.error.textContent = error.message + code;
    }
    const { usage } = this;
    const now = performance.now();
    const facts = [];
    if (this.firstMs) facts.push(`first token ${duration(this.firstMs - this.startedMs)}`);
    if (usage) {
      const rate =
        usage.completion_tokens > 1 && this.firstMs
          ? (1000 * (usage.completion_tokens - 1)) / (now - this.firstMs)
          : null;
      facts.push(`${number(usage.prompt_tokens)} → ${number(usage.completion_tokens)} tokens`);
      if (usage.prompt_tokens_details?.cached_tokens)
        facts.push(`${number(usage.prompt_tokens_details.cached_tokens)} cached`);
      if (rate) facts.push(`${number(rate)} tokens/s`);
      const cost = costOf(usage);
      if (cost) facts.push(money(cost.cost, cost.currency));
    }
    if (stopped) facts.push("stopped");
    else if (this.finish)
      facts.push(
        { stop: "ended by itself", length: "cut at max tokens" }[this.finish] ?? this.finish,
      );
    if (!this.content && !error && !stopped)
      this.text.append(el("span", { class: "note" }, "(an empty answer)"));
    this.meta.textContent = facts.join(" · ");
  }

  /** What the server recorded of it. */
  showTime(content) {
    this.time.hidden = false;
    this.time.append(content);
  }
}

/** The tokens that were likely at one place, beside the one that was chosen. */
export class Tip {
  constructor() {
    this.element = el("div", { class: "tip", role: "status", hidden: true });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.hide();
    });
  }

  show(anchor, entries) {
    this.element.replaceChildren(...entries.map((entry) => tokenTable(entry)));
    this.element.hidden = false;
    const box = anchor.getBoundingClientRect();
    const own = this.element.getBoundingClientRect();
    const left = Math.min(
      Math.max(8, box.left),
      document.documentElement.clientWidth - own.width - 8,
    );
    const above = box.bottom + own.height + 10 > innerHeight && box.top > own.height + 10;
    this.element.style.left = `${left}px`;
    this.element.style.top = `${above ? box.top - own.height - 6 : box.bottom + 6}px`;
  }

  hide() {
    this.element.hidden = true;
  }
}

function tokenTable(entry) {
  const rows = [entry, ...(entry.top_logprobs ?? []).filter((one) => !same(one, entry))].sort(
    (a, b) => b.logprob - a.logprob,
  );
  return el(
    "table",
    {},
    el(
      "caption",
      {},
      "Chosen ",
      el("code", {}, visible(entry.token)),
      ` · log-probability ${entry.logprob.toFixed(3)}`,
    ),
    el(
      "tbody",
      {},
      rows.map((one) => {
        const bar = el("span", { class: "meter-fill" });
        bar.style.width = `${100 * Math.exp(one.logprob)}%`;
        return el(
          "tr",
          { class: one === entry ? "chosen" : null },
          el(
            "th",
            { scope: "row" },
            el("code", {}, visible(one.token)),
            one === entry ? el("span", { class: "unseen" }, " (chosen)") : null,
          ),
          el("td", {}, el("span", { class: "meter-track", "aria-hidden": "true" }, bar)),
          el("td", { class: "number" }, percent(Math.exp(one.logprob), 2)),
        );
      }),
    ),
  );
}

function same(one, other) {
  return one.token === other.token && String(one.bytes) === String(other.bytes);
}

/** A token with its white space made visible. */
export function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}
