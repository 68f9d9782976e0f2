// Keys of the view that is shown, and the list of them that `?` opens.
import { element, replace } from "./dom.js";

let bindings = [];
let common = [];

// A binding is { keys: ["j", "ArrowDown"], does: "next run", run: (event) => {} }. `view` is a node of the view. A view
// that loads late, after another view has replaced it, sets no keys.
export function setKeys(view, list) {
  if (view.isConnected) bindings = list;
}
// The key that leaves a page of a view. It works while the page still loads.
export function backKey(does, run) {
  return { keys: ["u", "Backspace"], does, run };
}
export function setCommonKeys(list) {
  common = list;
}

const NAMES = { ArrowDown: "↓", ArrowUp: "↑", ArrowLeft: "←", ArrowRight: "→", Escape: "Esc", " ": "Space" };
const keyName = (key) => NAMES[key] || key;

const dialog = element("dialog", { class: "keys", "aria-label": "Keys" });
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

export function showHelp() {
  if (!dialog.isConnected) document.body.append(dialog);
  if (dialog.open) {
    dialog.close();
    return;
  }
  const rows = (list) =>
    list.map(({ keys, does }) =>
      element(
        "tr",
        null,
        element(
          "th",
          { scope: "row" },
          keys.map((key) => element("kbd", null, keyName(key))),
        ),
        element("td", null, does),
      ),
    );
  const part = (title, list) =>
    list.length ? [element("h3", null, title), element("table", null, element("tbody", null, rows(list)))] : [];
  replace(
    dialog,
    element("h2", null, "Keys"),
    part("Here", bindings),
    part("Everywhere", common),
    element("button", { type: "button", onclick: () => dialog.close() }, "Close"),
  );
  dialog.showModal();
}

function isTyping(target) {
  return (
    target.matches &&
    target.matches(
      "input:not([type=checkbox]):not([type=radio]):not([type=range]), select, textarea, [contenteditable]",
    )
  );
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  // Only Escape leaves a field; a dialog has its own keys.
  if (isTyping(event.target)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (document.querySelector("dialog[open]") && event.key !== "?") return;
  const binding = [...bindings, ...common].find((each) => each.keys.includes(event.key));
  if (!binding) return;
  event.preventDefault();
  binding.run(event);
});
