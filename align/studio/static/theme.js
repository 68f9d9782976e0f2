// Sets the color scheme before the page is drawn. The choice is "light", "dark" or "auto", which is the system's.
"use strict";
const studioTheme = (function () {
  const KEY = "align-studio-theme";
  const QUERIES = { auto: "screen and (prefers-color-scheme: dark)", dark: "screen", light: "not all" };
  const NAMES = Object.keys(QUERIES);

  function read() {
    try {
      const name = localStorage.getItem(KEY);
      return NAMES.includes(name) ? name : "auto";
    } catch (error) {
      return "auto"; // storage may be refused
    }
  }
  function apply(name) {
    document.getElementById("dark").media = QUERIES[name];
  }
  function next() {
    const name = NAMES[(NAMES.indexOf(read()) + 1) % NAMES.length];
    try {
      localStorage.setItem(KEY, name);
    } catch (error) {
      /* the choice lasts until the page is closed */
    }
    apply(name);
    return name;
  }

  apply(read());
  return { read, next };
})();
