"""Take the pictures of the documentation from the report page of a run, with a headless Chromium.

    align run quickstart --store store
    .venv/bin/python tools/take_screenshots.py store/reports/quickstart/report.html

It writes the run page, the scorecard and the responses to one prompt to ``docs/assets/screenshots/`` as PNG files of at
most 150 kB. It needs Chromium with its driver (``make browser``), selenium and Pillow, and fetches no other page.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

FOLDER = Path(__file__).parents[1] / "docs" / "assets" / "screenshots"
PICTURES = {"run_page": "#summary", "scorecard": "#scorecard", "rollout": "#samples"}
"""Name of a picture → section of the page at its top."""
WIDTH, HEIGHT = 1200, 760
MAX_BYTES = 150_000
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def main() -> None:
    """Write a picture of each section that the page has."""
    parser = argparse.ArgumentParser(description="Take the pictures of the documentation from a report page.")
    parser.add_argument("page", type=Path, help="report page of a finished run")
    page = parser.parse_args().page.resolve()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not page.is_file():
        sys.exit(f"{page}: needs a report page, and Chromium with its driver (`make browser`).")
    FOLDER.mkdir(parents=True, exist_ok=True)
    driver = _open(browser)
    try:
        driver.get(page.as_uri())
        for name, selector in PICTURES.items():
            path = FOLDER / f"{name}.png"
            path.write_bytes(_picture(driver, selector))
            print(f"{path}: {path.stat().st_size:,} bytes")
    finally:
        driver.quit()


def _open(browser: str) -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in (*SWITCHES, f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(switch)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def _picture(driver: Any, selector: str) -> bytes:
    """Return a picture of the window with a section at its top, with fewer colors if it is too large."""
    script = "document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'});"
    driver.execute_script(script, selector)
    shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    for colors in (256, 64, 16):
        content = io.BytesIO()
        shot.quantize(colors).save(content, "PNG", optimize=True)
        if content.tell() <= MAX_BYTES:
            return content.getvalue()
    sys.exit(f"{selector}: the picture has more than {MAX_BYTES:,} bytes; reduce WIDTH or HEIGHT.")


if __name__ == "__main__":
    main()
