// The page: tabs, theme, key, and the line that says whether it is connected.

import { key } from "./api.js";
import { Alerts } from "./alerts.js";
import { Chat } from "./chat.js";
import { Costs } from "./costs.js";
import { el, say } from "./dom.js";
import { duration } from "./format.js";
import { Feed } from "./feed.js";
import { Models } from "./models.js";
import { Overview } from "./overview.js";
import { Requests } from "./requests.js";
import { Slo } from "./slo.js";

const THEME = "jaxserve.theme";
const THEMES = ["auto", "light", "dark"];
const WORDS = {
  waiting: "Connecting",
  live: "Live",
  key: "Key needed",
  forbidden: "Not an admin's key",
  off: "Not observed",
  down: "Disconnected",
};

const byId = (id) => document.getElementById(id);
const feed = new Feed();
const tabs = Object.entries({
  overview: Overview,
  chat: Chat,
  requests: Requests,
  slo: Slo,
  costs: Costs,
  alerts: Alerts,
  models: Models,
}).map(([id, Tab]) => ({ id, view: new Tab(feed) }));

// ---------------------------------------------------------------- tabs

for (const tab of tabs) {
  tab.button = el(
    "button",
    {
      type: "button",
      role: "tab",
      id: `tab-${tab.id}`,
      "aria-controls": `panel-${tab.id}`,
      "aria-selected": "false",
      tabindex: -1,
      onclick: () => {
        location.hash = tab.id;
      },
    },
    tab.view.title,
  );
  tab.panel = el("section", {
    role: "tabpanel",
    id: `panel-${tab.id}`,
    "aria-labelledby": `tab-${tab.id}`,
    hidden: true,
  });
  byId("tabs").append(tab.button);
  byId("main").append(tab.panel);
}

byId("tabs").addEventListener("keydown", (event) => {
  const at = tabs.findIndex((tab) => tab.button === document.activeElement);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const tab = tabs[(to + tabs.length) % tabs.length];
  location.hash = tab.id;
  choose();
  tab.button.focus();
});

let shown = null;

function choose() {
  const wanted = location.hash.slice(1);
  const chosen = tabs.find((tab) => tab.id === wanted) ?? tabs[0];
  if (chosen === shown) return;
  shown = chosen;
  for (const tab of tabs) {
    const on = tab === chosen;
    tab.button.setAttribute("aria-selected", String(on));
    tab.button.tabIndex = on ? 0 : -1;
    tab.panel.hidden = !on;
    // What is not seen is not in the document: it draws nothing and asks for nothing.
    if (on) tab.panel.replaceChildren(tab.view.element);
    else tab.panel.replaceChildren();
  }
  chosen.button.scrollIntoView({ block: "nearest", inline: "center" });
  document.title = `${chosen.view.title} · jaxserve console`;
  chosen.view.update();
}
addEventListener("hashchange", choose);

// ---------------------------------------------------------------- theme

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  byId("theme-name").textContent = theme;
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
}
byId("theme").addEventListener("click", () => {
  const at = THEMES.indexOf(localStorage.getItem(THEME) ?? "auto");
  setTheme(THEMES[(at + 1) % THEMES.length]);
});
setTheme(THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");

// ---------------------------------------------------------------- key

function showKey(open) {
  byId("key-panel").hidden = !open;
  byId("key-button").setAttribute("aria-expanded", String(open));
  byId("key-forget").hidden = !key.get();
}
byId("key-button").addEventListener("click", () => {
  showKey(byId("key-panel").hidden);
  if (!byId("key-panel").hidden) byId("key").focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = byId("key").value.trim();
  if (!value) return;
  key.set(value);
  changed();
});
byId("key-forget").addEventListener("click", () => {
  key.forget();
  changed();
});

function changed() {
  byId("key").value = "";
  feed.clear();
  feed.poke();
  shown.view.update();
}

// ---------------------------------------------------------------- connection

feed.addEventListener("state", () => {
  byId("connection").dataset.state = feed.state;
  if (feed.state === "key") showKey(true);
  else if (feed.state === "live" || feed.state === "forbidden") showKey(false);
  byId("key-button").hidden = feed.state === "live" && !key.get();
  say(
    byId("announce"),
    feed.state === "live" ? "Connected" : `${WORDS[feed.state]}. ${feed.error}`,
  );
});
feed.addEventListener("update", () => {
  say(byId("model"), feed.now?.engine?.model ?? "");
  const engine = feed.now?.engine?.state;
  let text = WORDS[feed.state];
  if (feed.state === "live" && engine && engine !== "ready") text = `Engine ${engine}`;
  if (feed.state === "down" && feed.updatedMs)
    text = `Disconnected for ${duration(Date.now() - feed.updatedMs)}`;
  byId("connection").dataset.state =
    feed.state === "live" && engine !== "ready" && engine ? "off" : feed.state;
  say(byId("connection-text"), text);
  document.body.classList.toggle("stale", feed.state === "down" && feed.now !== null);
});

choose();
feed.start();
