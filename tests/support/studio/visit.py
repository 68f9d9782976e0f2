"""A visit of the studio with a real browser: open views, press keys, wait, and keep screenshots."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.report.browser import console, emulate, resize
from tests.support.studio.server import RunningStudio

ENTER = "\ue007"
HOME = "\ue011"
RIGHT = "\ue014"
SECONDS = 180.0
"""Longest wait for a page; the machine may be busy with the run that the page shows."""


@dataclass
class Visit:
    """A browser at a studio; ``pictures`` is the folder of the screenshots."""

    driver: Any
    studio: RunningStudio
    pictures: Path

    def open(self, place: str, ready: str) -> None:
        """Open a view with the printed address and wait until ``ready`` matches an element."""
        self.driver.get("about:blank")
        self.driver.get(self.studio.address)
        self.driver.get(f"{self.studio.origin}/{place}")
        self.driver.refresh()  # else elements of the view before could match
        self.wait(f"document.querySelector({json.dumps(ready)}) !== null")

    def wait(self, script: str, seconds: float = SECONDS) -> Any:
        """Return the value of an expression once it is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.1).until(
            lambda browser: browser.execute_script(f"return {script}"), script
        )

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def texts(self, selector: str) -> list[str]:
        """Return the texts of the elements that a selector matches."""
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent.trim())"
        return [str(text) for text in self.driver.execute_script(script, selector)]

    def capture(self, name: str) -> None:
        """Save the page in both widths and color schemes, and check that it fits and that its console is empty."""
        self.pictures.mkdir(exist_ok=True)
        for width in (1280, 390):
            resize(self.driver, width, 844)
            for scheme in ("light", "dark"):
                emulate(self.driver, scheme)
                self.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 300))")
                self.driver.save_screenshot(str(self.pictures / f"{name}_{width}_{scheme}.png"))
            assert self.driver.execute_script("return document.documentElement.scrollWidth") <= width, (name, width)
        emulate(self.driver, "light")
        resize(self.driver, 1280, 844)
        assert console(self.driver) == [], name
