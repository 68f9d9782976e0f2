"""A real Chromium for tests of pages: Debian's, through its own driver, without a network."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
DRIVER = shutil.which("chromedriver") or ""
MISSING = "no Chromium with its driver here: `make browser` (apt-get install chromium chromium-driver)"
SWITCHES = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync",
    "--hide-scrollbars", "--force-prefers-reduced-motion", "--force-device-scale-factor=1",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip

CONTRASTS = """
const luminance = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
  .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
  .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
const ground = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (!color.endsWith(", 0)")) return color;
  }
  return "rgb(255, 255, 255)";
};
const contrast = (ink, paper) => {
  const [low, high] = [luminance(ink), luminance(paper)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const more = arguments[0] ? ", " + arguments[0] : "";
const texts = "p, li, td, th, dt, dd, summary, h2, h3, .chip, .tag, button, select, b, text";
return [...document.querySelectorAll(`main :is(${texts}${more})`)]
  .filter((element) => element.checkVisibility())
  .map((element) => {
    const style = getComputedStyle(element);
    const ink = element.tagName === "text" ? style.fill : style.color;
    return [element.tagName, element.textContent.trim().slice(0, 30), contrast(ink, ground(element))];
  })
  .filter(([, , value]) => value < 4.5).slice(0, 10);
"""
"""Script that returns the texts of a page with too little contrast; its argument are further selectors."""

TABLES_FIT = """
return [...document.querySelectorAll("nav, .scroll:has(> table)")].every((box) => box.scrollWidth <= box.clientWidth);
"""
"""Script that returns whether no table and no menu scrolls sideways."""

THERE = bool(CHROMIUM and DRIVER and importlib.util.find_spec("selenium"))
needs_browser = pytest.mark.skipif(not THERE, reason=MISSING)


@contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A selenium driver that keeps the console's messages and every request the page makes."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--window-size={width},{height}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = _start(options)
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def _start(options: Any) -> Any:
    """A session; a second try after one that failed: a browser's first start from a cold disk may take a minute."""
    from selenium import webdriver
    from selenium.common.exceptions import SessionNotCreatedException

    try:
        return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    except SessionNotCreatedException:
        return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def open_page(driver: Any, page: Path) -> None:
    """Open a page and wait until it is whole; what the one before it wrote and asked for is forgotten."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get("about:blank")
    console(driver), requests(driver, page)
    driver.get(page.as_uri())
    # on a busy machine the driver may be back before the last of a page of this size is parsed
    is_loaded = "return document.readyState === 'complete' && document.querySelector('footer') !== null"
    WebDriverWait(driver, 60).until(lambda page: page.execute_script(is_loaded))


def resize(driver: Any, width: int, height: int) -> None:
    """The page at this width, as on a phone: a window is never narrower than 500 pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def console(driver: Any) -> list[str]:
    """What the page wrote to the console since the last call: errors, warnings, blocked scripts."""
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]


def requests(driver: Any, page: Path) -> list[str]:
    """Addresses that were asked for since the last call, without the page itself and what it carries in it."""
    addresses = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"].partition("#")[0]
            if address != page.as_uri() and not address.startswith("data:"):
                addresses.append(address)
    return addresses


def emulate(driver: Any, scheme: str, media: str = "") -> None:
    """Show the page in the color scheme ``light`` or ``dark``, on a screen or in ``print``."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features, "media": media})
