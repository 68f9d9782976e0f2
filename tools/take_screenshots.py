"""Take the pictures of the documentation from the report page of a run, or from a studio, with a headless Chromium.

    align run quickstart --store store
    .venv/bin/python tools/take_screenshots.py store/reports/quickstart/report.html
    align studio --store store                      # prints the address
    .venv/bin/python tools/take_screenshots.py 'http://127.0.0.1:8010/?token=...' studio_runs='#/runs'

It writes the run page, the scorecard and the responses to one prompt, or the named views of the studio, to
``docs/assets/screenshots/`` as PNG files of at most 150 kB. A name with ``dark`` is shown in dark colors, a name with
``phone`` at 390 pixels. ``--message`` is sent in the view Chat, whose picture has the replies. It needs Chromium with
its driver (``make browser``), selenium and Pillow, and fetches no other page.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FOLDER = Path(__file__).parents[1] / "docs" / "assets" / "screenshots"
PICTURES = {"run_page": "#summary", "scorecard": "#scorecard", "rollout": "#samples"}
"""Name of a picture → section of the page at its top."""
WIDTH, HEIGHT = 1200, 760
PHONE_WIDTH = 390
SECONDS_TO_LOAD = 4.0
"""Time that a view has for its first data."""
SECONDS_TO_REPLY = 300.0
HAS_REPLIED = """
const replies = [...document.querySelectorAll(".reply")];
return replies.length > 0 && replies.every((reply) => reply.getAttribute("aria-busy") === "false");
"""
"""Script that returns whether every model of a chat has replied."""
MAX_BYTES = 150_000
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def main() -> None:
    """Write a picture of each section that the page has."""
    parser = argparse.ArgumentParser(description="Take the pictures of the documentation from a report page.")
    parser.add_argument("page", help="report page of a finished run, or the address of a studio with its token")
    parser.add_argument("views", nargs="*", metavar="NAME=PLACE", help="views of the studio: studio_runs='#/runs'")
    parser.add_argument(
        "--message", default="", help="message for the models of the view '#/chat?models=RUN:STAGE,RUN:STAGE'"
    )
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    is_studio = options.page.startswith("http://")
    if browser is None or not (is_studio or Path(options.page).is_file()):
        sys.exit(f"{options.page}: needs a report page or a studio, and Chromium with its driver (`make browser`).")
    FOLDER.mkdir(parents=True, exist_ok=True)
    driver = _open(browser)
    try:
        if is_studio:
            _take_views(driver, options.page, dict(view.split("=", 1) for view in options.views), options.message)
        else:
            driver.get(Path(options.page).resolve().as_uri())
            for name, selector in PICTURES.items():
                script = "document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'});"
                driver.execute_script(script, selector)
                _save(driver, name)
    finally:
        driver.quit()


def _take_views(driver: Any, address: str, views: dict[str, str], message: str) -> None:
    """Write a picture of each view; the first visit moves the token into a cookie."""
    for name, place in views.items():
        features = [{"name": "prefers-color-scheme", "value": "dark" if "dark" in name else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        width = PHONE_WIDTH if "phone" in name else WIDTH
        metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width == PHONE_WIDTH}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get("about:blank")
        driver.get(address)
        driver.get(f"{address.partition('?')[0]}{place}")
        time.sleep(SECONDS_TO_LOAD)
        if message and place.startswith("#/chat"):
            driver.find_element("css selector", "#message").send_keys(message, Keys.ENTER)
            WebDriverWait(driver, SECONDS_TO_REPLY).until(lambda page: page.execute_script(HAS_REPLIED))
        _save(driver, name)


def _save(driver: Any, name: str) -> None:
    path = FOLDER / f"{name}.png"
    path.write_bytes(_picture(driver, name))
    print(f"{path}: {path.stat().st_size:,} bytes")


def _open(browser: str) -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in (*SWITCHES, f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(switch)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def _picture(driver: Any, name: str) -> bytes:
    """Return a picture of the window, with fewer colors if it is too large."""
    shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    for colors in (256, 64, 16):
        content = io.BytesIO()
        shot.quantize(colors).save(content, "PNG", optimize=True)
        if content.tell() <= MAX_BYTES:
            return content.getvalue()
    sys.exit(f"{name}: the picture has more than {MAX_BYTES:,} bytes; reduce WIDTH or HEIGHT.")


if __name__ == "__main__":
    main()
