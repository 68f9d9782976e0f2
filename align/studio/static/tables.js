// Tables with headings.
import { element } from "./dom.js";

export const amount = (value) => Number(value || 0).toLocaleString("en");

export function cells(values) {
  return values.map((value) => {
    const isNumber = typeof value === "number";
    return element("td", { class: isNumber ? "num" : null }, isNumber ? amount(value) : value);
  });
}

// Returns a table. A heading is a text, or a text and a note below it; a "#" at its end makes a column of numbers. In a
// narrow window a row is a card, whose cells have their headings next to them.
export function table(headings, rows, name = "") {
  const columns = headings.map((heading) => {
    const [text, note] = [heading].flat();
    return { title: text.replace(/#$/, ""), isNumber: text.endsWith("#"), note };
  });
  for (const row of rows)
    [...row.cells].forEach((cell, index) => {
      const { title } = columns[index];
      if (title && cell.tagName === "TD" && cell.colSpan === 1) cell.setAttribute("data-title", title);
    });
  const head = columns.map(({ title, isNumber, note }) =>
    element(
      "th",
      { scope: "col", class: isNumber ? "num" : null },
      title,
      note && element("div", { class: "small" }, note),
    ),
  );
  return element(
    "div",
    { class: "scroll" },
    element(
      "table",
      { class: `cards ${name}` },
      element("thead", null, element("tr", null, head)),
      element("tbody", null, rows),
    ),
  );
}
