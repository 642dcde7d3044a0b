// What is served: models, adapters (loaded and unloaded here), the engine's state and versions.

import { json } from "./api.js";
import { blank, el, table } from "./dom.js";
import { duration, moment, number, percent } from "./format.js";

export class Models {
  title = "Models";

  constructor(feed) {
    this.feed = feed;
    this.health = el("div", {});
    this.models = el("div", {});
    this.adapters = el("div", {});
    this.outcome = el("p", { class: "outcome", role: "status" });
    this.name = el("input", {
      id: "lora-name",
      required: true,
      autocomplete: "off",
      spellcheck: "false",
    });
    this.path = el("input", {
      id: "lora-path",
      required: true,
      autocomplete: "off",
      spellcheck: "false",
      placeholder: "/directory, gs:// or s3://",
    });
    this.replace = el("input", { id: "lora-replace", type: "checkbox" });
    this.load = el("button", { class: "primary", type: "submit" }, "Load");
    this.form = el(
      "form",
      { class: "card fields", onsubmit: (event) => this.#load(event) },
      el("h3", {}, "Load an adapter"),
      el("label", { for: "lora-name" }, "Name", this.name),
      el("label", { for: "lora-path" }, "From", this.path),
      el(
        "label",
        { class: "check", for: "lora-replace" },
        this.replace,
        " replace one of the same name",
      ),
      this.load,
      this.outcome,
    );
    this.element = el(
      "div",
      {},
      el("div", { class: "bar" }, el("h2", {}, "Engine")),
      this.health,
      el("h2", {}, "Models"),
      this.models,
      el("h2", {}, "Adapters"),
      el("div", { class: "halves" }, this.adapters, this.form),
    );
    feed.addEventListener("update", () => this.#showHealth());
  }

  async update() {
    this.#showHealth();
    try {
      const { data } = await json("/v1/models");
      this.data = data;
      this.#show(data);
    } catch (error) {
      this.models.replaceChildren(
        blank(error.status === 401 ? "A key is needed" : "Not available", error.message),
      );
      this.adapters.replaceChildren();
      this.data = null;
      this.shownAdapters = "";
    }
  }

  #showHealth() {
    const { now } = this.feed;
    const engine = now?.engine;
    if (!this.element.isConnected) return;
    const shown = JSON.stringify(engine);
    if (shown === this.shownEngine) return;
    this.shownEngine = shown;
    if (this.data) this.#showAdapters();
    const facts = engine
      ? [
          ["State", engine.state],
          ["Process", engine.pid],
          ["Last step", `${duration(1000 * engine.step_age_s)} ago`],
          ["Compiled after warm-up", number(engine.compiles_after_warmup)],
          ["Rows", number(engine.max_rows)],
          ["KV pages", `${number(engine.pages_used)} of ${number(engine.pages_total)}`],
          engine.host_pages_total
            ? [
                "Pages on the host",
                `${number(engine.host_pages_used)} of ${number(engine.host_pages_total)}`,
              ]
            : null,
          engine.adapter_slots
            ? ["Adapter slots", `${engine.adapters_held} of ${engine.adapter_slots} held`]
            : null,
          engine.adapter_joins
            ? ["Adapter hits", percent(engine.adapter_hits / engine.adapter_joins)]
            : null,
          ["jaxserve", now.server.jaxserve],
          ["Python", now.server.python],
          ["Observed for", duration(1000 * now.observed_s)],
        ].filter(Boolean)
      : null;
    this.health.replaceChildren(
      facts
        ? el(
            "dl",
            { class: "facts card" },
            facts.map(([name, value]) =>
              el("div", {}, el("dt", {}, name), el("dd", {}, String(value))),
            ),
            engine.error ? el("p", { class: "error-text" }, engine.error) : null,
          )
        : blank("Unknown", "The engine's state needs a key of the admin role."),
    );
  }

  #show(data) {
    const bases = data.filter((card) => !card.parent);
    this.models.replaceChildren(
      el(
        "div",
        { class: "card scroll" },
        table(
          "Models",
          [{ label: "Name" }, { label: "Context", number: true }, { label: "Since", number: true }],
          bases.map((card) => [
            card.id,
            `${number(card.max_model_len)} tokens`,
            moment(card.created),
          ]),
        ),
      ),
    );
    this.#showAdapters();
  }

  #showAdapters() {
    const off = this.feed.now?.engine?.adapter_slots === 0;
    const adapters = this.data.filter((card) => card.parent);
    const shown = JSON.stringify([off, adapters]);
    if (shown === this.shownAdapters) return;
    this.shownAdapters = shown;
    this.adapters.replaceChildren(
      adapters.length
        ? el(
            "div",
            { class: "card scroll" },
            table(
              "Adapters",
              [
                { label: "Name" },
                { label: "From", wide: true },
                { label: "Content", wide: true },
                { label: "" },
              ],
              adapters.map((card) => [
                card.id,
                card.root,
                el("code", {}, (card.hash ?? "").slice(0, 12)),
                el(
                  "button",
                  {
                    class: "quiet small",
                    type: "button",
                    "aria-label": `Unload ${card.id}`,
                    onclick: (event) => this.#unload(card.id, event.currentTarget),
                  },
                  "Unload",
                ),
              ]),
            ),
          )
        : off
          ? blank("Adapters are off", "Start the server with lora.enabled=true to load some.")
          : blank("No adapters", "Load one here, or name some with lora.adapters."),
    );
    this.form.hidden = off;
  }

  async #load(event) {
    event.preventDefault();
    this.load.disabled = true;
    const name = this.name.value.trim();
    await this.#change(
      "/v1/load_lora_adapter",
      { lora_name: name, lora_path: this.path.value.trim(), load_inplace: this.replace.checked },
      `${name} is loaded.`,
    );
    this.load.disabled = false;
  }

  async #unload(name, button) {
    button.disabled = true;
    await this.#change("/v1/unload_lora_adapter", { lora_name: name }, `${name} is unloaded.`);
    button.disabled = false;
    this.name.focus(); // its row is gone
  }

  async #change(path, body, done) {
    this.outcome.className = "outcome";
    this.outcome.textContent = "Working…";
    try {
      await json(path, { body });
      this.outcome.textContent = done;
    } catch (error) {
      this.outcome.className = "outcome error-text";
      this.outcome.textContent = error.message;
    }
    await this.update();
  }
}
