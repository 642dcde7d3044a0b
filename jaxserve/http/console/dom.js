// Elements from data. Text only ever becomes text: there is no way from a string to markup here,
// and the page's policy (Trusted Types) forbids one.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Attributes: `class`, `on…` listeners, `dataset`, booleans; children: nodes or text. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Sets text only where it changed, so that screen readers and selections are left alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Puts new content in a place; what was scrolled or focused in the old stays so in the new. */
export function swap(place, ...content) {
  const before = [...place.querySelectorAll(".scroll")].map((region) => ({
    left: region.scrollLeft,
    top: region.scrollTop,
    focused: region === document.activeElement,
  }));
  place.replaceChildren(...content);
  place.querySelectorAll(".scroll").forEach((region, index) => {
    if (!before[index]) return;
    region.scrollLeft = before[index].left;
    region.scrollTop = before[index].top;
    if (before[index].focused) region.focus({ preventScroll: true });
  });
}

/** A state in place of content: nothing yet, not configured, an error. */
export function blank(title, note, kind = "empty") {
  return el(
    "div",
    { class: `blank ${kind}` },
    el("p", { class: "blank-title" }, title),
    note ? el("p", { class: "note" }, note) : null,
  );
}

/** A table that scrolls by itself where it is wide. Columns: {label, number, wide}; rows: arrays of cells. */
export function table(caption, columns, rows) {
  const cell = (column, content) =>
    el(
      "td",
      {
        class: [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") || null,
      },
      content ?? "–",
    );
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el(
      "table",
      {},
      el("caption", { class: "unseen" }, caption),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          columns.map((column) =>
            el(
              "th",
              {
                scope: "col",
                class:
                  [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") ||
                  null,
              },
              column.label,
            ),
          ),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            {},
            columns.map((column, index) => cell(column, row[index])),
          ),
        ),
      ),
    ),
  );
}
