// Says where a table or a figure goes on beyond its right edge, and fades that edge until it is reached.
"use strict";
(function () {
  for (const box of document.querySelectorAll(".scroll")) {
    const hint = document.createElement("p");
    hint.className = "swipe small";
    hint.hidden = true;
    hint.textContent = "⇢ goes on to the right: scroll or swipe";
    hint.setAttribute("aria-hidden", "true");
    box.before(hint);
    const update = () => {
      const hidden = box.scrollWidth - box.clientWidth;
      box.classList.toggle("goes-on", hidden > 1 && box.scrollLeft < hidden - 1);
      // Once the reader has found out, the hint has done its work.
      hint.hidden = hidden <= 1 || box.scrollLeft > 0;
    };
    box.addEventListener("scroll", update, { passive: true });
    const observer = new ResizeObserver(update);
    observer.observe(box);
    if (box.firstElementChild) observer.observe(box.firstElementChild);
  }
})();
