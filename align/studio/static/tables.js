// Tables with headings.
import { element } from "./dom.js";

export const amount = (value) => Number(value || 0).toLocaleString("en");

export function cells(values) {
  return values.map((value) => {
    const isNumber = typeof value === "number";
    return element("td", { class: isNumber ? "num" : null }, isNumber ? amount(value) : value);
  });
}

// Returns a table that scrolls sideways. A heading that ends in "#" is of a column of numbers.
export function table(headings, rows, name = null) {
  const head = headings.map((text) =>
    element("th", { scope: "col", class: text.endsWith("#") ? "num" : null }, text.replace(/#$/, "")),
  );
  return element(
    "div",
    { class: "scroll" },
    element("table", { class: name }, element("thead", null, element("tr", null, head)), element("tbody", null, rows)),
  );
}
