// Tables with headings.
import { element } from "./dom.js";

export const amount = (value) => Number(value || 0).toLocaleString("en");

export function cells(values) {
  return values.map((value) => {
    const isNumber = typeof value === "number";
    return element("td", { class: isNumber ? "num" : null }, isNumber ? amount(value) : value);
  });
}

// Returns a table. A heading that ends in "#" is of a column of numbers. In a narrow window a row is a card, whose cells
// have their headings next to them.
export function table(headings, rows, name = "") {
  for (const row of rows)
    [...row.cells].forEach((cell, index) => {
      const title = headings[index].replace(/#$/, "");
      if (title && cell.tagName === "TD" && cell.colSpan === 1) cell.setAttribute("data-title", title);
    });
  const head = headings.map((text) =>
    element("th", { scope: "col", class: text.endsWith("#") ? "num" : null }, text.replace(/#$/, "")),
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
