// Reloads the page of a run that goes on, and keeps what the reader has open. It waits while the reader types, has a
// curve enlarged, or looks at another window.
"use strict";
(function () {
  const seconds = Number(document.body.dataset.refresh);
  const STORE = "align-open:" + location.pathname;
  const folds = () => [...document.querySelectorAll("details")];
  // The summary of a fold whose like occurs once has counts that change. Of several alike, data-fold says which one.
  const labelOf = (fold) => fold.dataset.fold || fold.querySelector("summary").textContent.replace(/\d+/g, "");
  const nameOf = (fold) => (fold.closest("section") || fold).id + "/" + labelOf(fold);

  // Storage may be refused for files; the page then opens as it was written.
  try {
    const open = JSON.parse(sessionStorage.getItem(STORE) || "[]");
    for (const fold of folds()) if (open.includes(nameOf(fold))) fold.open = true;
  } catch (error) { /* nothing to restore */ }
  const save = () => {
    try {
      sessionStorage.setItem(STORE, JSON.stringify(folds().filter((fold) => fold.open).map(nameOf)));
    } catch (error) { /* reload without it */ }
  };
  // The next page may load before this one hides, and a fold may open while a reload is on its way.
  addEventListener("toggle", save, true);
  addEventListener("pagehide", save);
  if (!seconds) return;

  const button = document.getElementById("hold");
  let paused = false;
  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "Go on" : "Pause";
    if (paused) window.stop();  // a reload that was asked for and has not come yet
  });
  const isBusy = () => {
    const typing = document.activeElement?.matches("input, select, textarea");
    return paused || document.hidden || typing || document.querySelector("dialog[open]") !== null;
  };
  setInterval(() => {
    if (!isBusy()) location.reload();
  }, seconds * 1000);
})();
