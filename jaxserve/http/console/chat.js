// A chat, to try the model: parameters, a stream that can be stopped, and what it took.

import { Answer, Tip } from "./answer.js";
import { ApiError, call, events, json } from "./api.js";
import { blank, el } from "./dom.js";
import { waterfall } from "./waterfall.js";

const TRIES = 8;
const TRY_MS = 250;
const TOP_LOGPROBS = 5;

export class Chat {
  title = "Chat";

  constructor(feed) {
    this.feed = feed;
    this.turns = []; // {role, content}
    this.abort = null;
    this.asksCost = true;
    this.tip = new Tip();
    this.log = el(
      "div",
      { class: "log", role: "log", "aria-label": "Conversation", "aria-live": "off", tabindex: 0 },
      this.#welcome(),
    );
    this.status = el("p", { class: "unseen", role: "status" });
    this.input = el("textarea", {
      id: "prompt",
      rows: 2,
      placeholder: "Ask something",
      "aria-describedby": "prompt-note",
      onkeydown: (event) => this.#key(event),
    });
    this.send = el("button", { class: "primary", type: "submit" }, "Send");
    this.stop = el(
      "button",
      { class: "danger", type: "button", hidden: true, onclick: () => this.#stop() },
      "Stop",
    );
    this.clear = el(
      "button",
      { class: "quiet", type: "button", onclick: () => this.#clear() },
      "New chat",
    );
    this.fields = this.#makeFields();
    this.element = el(
      "div",
      {
        class: "chat",
        onkeydown: (event) => {
          if (event.key === "Escape") this.#stop();
        },
      },
      el("h2", { class: "unseen" }, "Chat"),
      el(
        "div",
        { class: "talk" },
        this.log,
        el(
          "form",
          {
            class: "composer",
            onsubmit: (event) => {
              event.preventDefault();
              this.#ask();
            },
          },
          el("label", { class: "unseen", for: "prompt" }, "Your message"),
          this.input,
          el(
            "div",
            { class: "actions" },
            el(
              "span",
              { id: "prompt-note", class: "note" },
              "Enter sends, Shift+Enter a new line, Esc stops",
            ),
            this.clear,
            this.stop,
            this.send,
          ),
        ),
        this.status,
      ),
      this.fields.element,
      this.tip.element,
    );
  }

  /** Shown: what can be asked. */
  async update() {
    let cards = [];
    try {
      cards = (await json("/v1/models")).data;
    } catch {
      return; // what is wrong is said where a message is sent
    }
    const embeds = this.feed.now?.engine?.embeds;
    const names = cards.map((card) => card.id).filter((name) => name !== embeds);
    const { model } = this.fields;
    if (names.join("\n") === [...model.options].map((option) => option.value).join("\n")) return;
    const before = model.value;
    model.replaceChildren(
      ...cards
        .filter((card) => names.includes(card.id))
        .map((card) =>
          el("option", { value: card.id }, card.parent ? `${card.id} (adapter)` : card.id),
        ),
    );
    if (names.includes(before)) model.value = before;
  }

  #makeFields() {
    const numeric = (id, options) =>
      el("input", { id, type: "number", inputmode: "decimal", ...options });
    const fields = {
      model: el("select", { id: "p-model" }, el("option", { value: "" }, "the server's")),
      system: el("textarea", { id: "p-system", rows: 3, placeholder: "none" }),
      temperature: numeric("p-temperature", { min: 0, max: 2, step: 0.1, value: 0.7 }),
      top_p: numeric("p-top-p", { min: 0, max: 1, step: 0.05, value: 1 }),
      max_tokens: numeric("p-max-tokens", { min: 1, step: 1, value: 256 }),
      seed: numeric("p-seed", { step: 1, placeholder: "random" }),
      schema: el("textarea", {
        id: "p-schema",
        rows: 3,
        spellcheck: "false",
        placeholder: '{"type": "object", …}',
      }),
      logprobs: el("input", { id: "p-logprobs", type: "checkbox", checked: true }),
    };
    const labelled = (label, field) => el("label", { for: field.id }, label, field);
    const wide = matchMedia("(min-width: 900px)").matches;
    fields.element = el(
      "details",
      { class: "parameters card", open: wide },
      el("summary", {}, "Parameters"),
      el(
        "div",
        { class: "fields" },
        labelled("Model or adapter", fields.model),
        labelled("System prompt", fields.system),
        el(
          "div",
          { class: "pair" },
          labelled("Temperature", fields.temperature),
          labelled("Top p", fields.top_p),
        ),
        el(
          "div",
          { class: "pair" },
          labelled("Max tokens", fields.max_tokens),
          labelled("Seed", fields.seed),
        ),
        labelled("JSON schema of the answer", fields.schema),
        el("label", { class: "check", for: "p-logprobs" }, fields.logprobs, " Token probabilities"),
        el(
          "p",
          { class: "note" },
          "Tokens that were less likely are underlined. Point at one, or choose it with the arrow keys, to see what else was likely.",
        ),
      ),
    );
    return fields;
  }

  #welcome() {
    return blank(
      "Try the model",
      "Choose parameters, ask something, and see each token's alternatives and where the time went.",
    );
  }

  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.#ask();
  }

  #stop() {
    this.abort?.abort();
  }

  #clear() {
    this.#stop();
    this.turns = [];
    this.log.replaceChildren(this.#welcome());
    this.input.focus();
  }

  async #ask() {
    const content = this.input.value.trim();
    if (!content || this.abort) return;
    this.log.querySelector(":scope > .blank")?.remove();
    this.input.value = "";
    this.log.append(
      el(
        "article",
        { class: "turn user", "aria-label": "You" },
        el("p", { class: "who" }, "You"),
        el("div", { class: "text" }, content),
      ),
    );
    const answer = new Answer(this.tip);
    this.log.append(answer.element);
    this.log.scrollTop = this.log.scrollHeight;
    this.turns.push({ role: "user", content });
    const turns = this.turns;
    this.abort = new AbortController();
    this.#busy(true);
    let how = {};
    try {
      await this.#stream(answer, this.abort.signal);
    } catch (error) {
      how = error.name === "AbortError" ? { stopped: true } : { error };
      if (how.error && !(error instanceof ApiError))
        how.error = new ApiError(0, `The answer could not be read: ${error.message}`);
    }
    answer.end(how);
    if (answer.content) turns.push({ role: "assistant", content: answer.content });
    else turns.pop(); // what was not answered is not sent again
    this.abort = null;
    this.#busy(false);
    this.status.textContent = how.error
      ? ""
      : how.stopped
        ? "Stopped."
        : `Answered: ${answer.content}`;
    this.#follow();
    this.#explain(answer);
  }

  async #stream(answer, signal) {
    const response = await this.#call(signal);
    answer.requestId = response.headers.get("x-request-id") ?? "";
    for await (const chunk of events(response)) {
      if (chunk.error) throw new ApiError(0, chunk.error.message, chunk.error.code ?? "");
      const atEnd = this.#atEnd();
      answer.add(chunk);
      if (atEnd) this.#follow();
    }
    if (!answer.finish) throw new ApiError(0, "The stream ended before the answer was complete.");
  }

  async #call(signal) {
    const body = this.#body();
    try {
      return await call("/v1/chat/completions", {
        body: this.asksCost ? { ...body, include_cost: true } : body,
        signal,
      });
    } catch (error) {
      if (!this.asksCost || error.param !== "include_cost") throw error;
      this.asksCost = false; // this server prices nothing
      return call("/v1/chat/completions", { body, signal });
    }
  }

  #body() {
    const { model, system, temperature, top_p, max_tokens, seed, schema, logprobs } = this.fields;
    const body = {
      messages: [...this.turns],
      stream: true,
      stream_options: { include_usage: true },
    };
    if (model.value) body.model = model.value;
    if (system.value.trim())
      body.messages.unshift({ role: "system", content: system.value.trim() });
    for (const [name, field] of Object.entries({ temperature, top_p, max_tokens, seed })) {
      if (field.value !== "") body[name] = Number(field.value);
    }
    if (schema.value.trim()) body.response_format = formatOf(schema.value);
    if (logprobs.checked) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
    return body;
  }

  #busy(on) {
    this.send.hidden = on;
    this.stop.hidden = !on;
    if (on) this.stop.focus({ preventScroll: true });
    else this.input.focus({ preventScroll: true });
  }

  #atEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
  }

  #follow() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** The waterfall: the record of a request reaches the observer a moment after its last byte. */
  async #explain(answer) {
    if (!answer.requestId || this.feed.state !== "live") return;
    for (let attempt = 0; attempt < TRIES; attempt += 1) {
      await new Promise((resolve) => setTimeout(resolve, TRY_MS));
      try {
        answer.showTime(waterfall(await json(`/console/request?id=${answer.requestId}`)));
        return;
      } catch (error) {
        if (error.status !== 404) return;
      }
    }
  }
}

/** What holds an answer to a schema. */
function formatOf(text) {
  let schema;
  try {
    schema = JSON.parse(text);
  } catch (error) {
    throw new ApiError(0, `The JSON schema is no JSON: ${error.message}`);
  }
  return { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
}
