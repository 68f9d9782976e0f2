"""The studio in a real browser: no errors, nothing wider than the window, text that stays text, keys that work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import StageFailed
from align.runner.runner import run_pipeline
from align.store.store import Store
from tests.support import toy
from tests.support.report.browser import CONTRASTS, TABLES_FIT, chromium, console, emulate, needs_browser, resize
from tests.support.studio.server import RunningStudio, running_studio

pytestmark = needs_browser
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202egpj\x1b[31m"
VISIBLE = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a finished run, and one whose failed stage has hostile texts, an alarm and many curves."""
    folder = tmp_path_factory.mktemp("browser") / "store"
    run_pipeline(Pipeline(toy.pipeline()), store=folder)
    raw = toy.pipeline(two={"crash": "bug"}) | {"name": "broken", "description": HOSTILE}
    with pytest.raises(StageFailed):
        run_pipeline(Pipeline(raw), store=folder)
    outline = Store.open(folder).runs()["broken"]["stages"]["two"]
    partial = Store.open(folder).partial(outline["kind"], outline["key"])
    (partial / "checkpoints" / "rollouts").mkdir()
    (partial / "log.txt").write_text(f"{HOSTILE}\n" * 200)
    with (partial / "events.jsonl").open("a", encoding="utf-8") as file:
        for step in range(40):
            values = {"kl": step / 10, "score": -1 / (1 + step), "test_score": 0.1 * step, HOSTILE: step}
            file.write(json.dumps({"event": "metrics", "step": step, **values}) + "\n")
        for message in (HOSTILE, "two: update 3: KL: it is high."):
            file.write(json.dumps({"event": "warning", "message": message}) + "\n")
    return folder


@pytest.fixture(scope="module")
def studio(store: Path) -> Iterator[RunningStudio]:
    with running_studio(store) as running:
        yield running


def wait_until(driver: Any, script: str, seconds: float = 30) -> Any:
    """Return the value of a script once it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds).until(lambda browser: browser.execute_script(script))


def open_view(driver: Any, studio: RunningStudio, place: str, ready: str) -> None:
    """Open a view with the token, as the printed address does, and wait until ``ready`` matches an element."""
    driver.get("about:blank")
    console(driver)
    driver.get(studio.address)
    driver.get(f"{studio.origin}/{place}")
    wait_until(driver, f"return document.querySelector({json.dumps(ready)}) !== null")


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def texts(driver: Any, selector: str) -> list[str]:
    return [element.text for element in driver.find_elements("css selector", selector)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_views_fit_the_window_without_errors(driver: Any, studio: RunningStudio, width: int, scheme: str) -> None:
    resize(driver, width, 844)
    emulate(driver, scheme)
    for place, ready in (("#/runs", ".run-link"), ("#/runs/broken", "figure.curve"), ("#/runs/broken?tab=log", ".log")):
        open_view(driver, studio, place, ready)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width, place
        assert driver.execute_script(TABLES_FIT), place
        ground = {"light": "rgb(245, 246, 248)", "dark": "rgb(15, 20, 27)"}[scheme]
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == ground
        assert driver.execute_script(CONTRASTS, "a, .state, .dot, label, time, code") == [], place
        assert console(driver) == [], place
    emulate(driver, "light")
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_token_leaves_the_address(driver: Any, studio: RunningStudio) -> None:
    driver.get(studio.address)
    assert driver.current_url.partition("#")[0] == studio.origin + "/"
    assert driver.execute_script("return document.cookie") == ""


def test_hostile_texts_are_shown_as_texts(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, "#/runs/broken", "figure.curve")
    assert VISIBLE in " ".join(texts(driver, ".warnings li"))
    assert VISIBLE[:30] in driver.find_element("css selector", ".description").text
    titles = driver.execute_script("return [...document.querySelectorAll('.panel-title')].map((t) => t.textContent)")
    assert VISIBLE in titles
    press(driver, "l")
    wait_until(driver, "return document.querySelector('pre.log') !== null")
    assert VISIBLE in driver.find_element("css selector", "pre.log").get_property("textContent")
    assert driver.execute_script("return document.querySelectorAll('main img, main script').length") == 0
    assert driver.title == "broken · align studio"
    assert console(driver) == []


def test_what_the_policy_stops_is_in_the_console(driver: Any, studio: RunningStudio) -> None:
    """A silent console elsewhere therefore says something."""
    open_view(driver, studio, "#/runs", ".run-link")
    driver.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    driver.execute_async_script("setTimeout(arguments[0], 300)")
    assert any("Content Security Policy" in line for line in console(driver))


def test_runs_are_reached_by_keys(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, "#/runs", ".run-link")
    assert texts(driver, ".run-link") == ["broken", "toy"]
    press(driver, "j", "j")
    assert driver.execute_script("return document.activeElement.textContent") == "toy"
    press(driver, "/", "f", "a", "i", "l", "e", "d")
    assert texts(driver, ".run-link") == ["broken"]
    press(driver, "\ue00c")  # Escape leaves the field
    press(driver, "?")
    assert "next run" in driver.find_element("css selector", "dialog[open]").text
    press(driver, "\ue00c")
    press(driver, "j", "\ue007")  # Enter
    wait_until(driver, "return document.querySelector('.diagram .box.failed') !== null")
    assert texts(driver, ".tabs h2") == ["two"], "the failed stage is chosen"
    press(driver, "k", "e")
    wait_until(driver, "return document.querySelector('.yaml') !== null")
    assert texts(driver, ".tabs h2") == ["one"]
    assert "number: 1" in driver.find_element("css selector", ".yaml").text
    press(driver, "u")
    wait_until(driver, "return document.querySelector('.runs') !== null")
    assert console(driver) == []


def test_values_are_read_off_and_curves_enlarged(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, "#/runs/broken?stage=two", "figure.curve")
    figure = driver.find_element("css selector", "figure.curve[data-title=score]")
    driver.execute_script("arguments[0].focus()", figure)
    figure.send_keys("\ue014", "\ue014")  # arrow right
    assert figure.find_element("css selector", ".reading").text == "step 1 · score −0.5 · test_score 0.1"
    assert driver.find_element("css selector", ".rows-link").text == "rollouts of update 1 o"
    figure.send_keys("\ue007")
    dialog = driver.find_element("css selector", "dialog.curve-view")
    assert dialog.get_attribute("open") is not None
    assert dialog.find_element("css selector", "h3").text == "two: score"
    dialog.send_keys("\ue00c")
    assert console(driver) == []


def test_alarms_and_steps_lead_to_their_rollouts(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, "#/runs/broken?stage=two", "figure.curve")
    links = driver.find_elements("css selector", ".warnings a")
    assert [link.get_attribute("href").partition("#")[2] for link in links] == ["/rollouts/broken/two?update=3"]
    figure = driver.find_element("css selector", "figure.curve[data-title=kl]")
    driver.execute_script("arguments[0].focus()", figure)
    figure.send_keys("\ue012")  # arrow left: the last step
    press(driver, "o")
    wait_until(driver, "return location.hash === '#/rollouts/broken/two?update=39'")


def test_colors_are_switched_and_remembered(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, "#/runs", ".run-link")
    color = "return getComputedStyle(document.body).backgroundColor"
    assert driver.execute_script(color) == "rgb(245, 246, 248)"
    press(driver, "t")
    assert driver.execute_script(color) == "rgb(15, 20, 27)"
    open_view(driver, studio, "#/runs", ".run-link")
    assert driver.execute_script(color) == "rgb(15, 20, 27)"
    press(driver, "t", "t")
    assert driver.execute_script(color) == "rgb(245, 246, 248)"


def test_a_new_run_appears_by_itself(driver: Any, studio: RunningStudio, store: Path) -> None:
    open_view(driver, studio, "#/runs", ".run-link")
    run_pipeline(Pipeline(toy.pipeline() | {"name": "later"}), store=store)
    wait_until(driver, "return document.querySelector('[data-run=later]') !== null")
    assert console(driver) == []


def test_a_run_is_resumed_and_stopped_by_keys(driver: Any, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    slow = toy.pipeline(one={"crash": "kill", "steps": 2000, "pause": 0.05})
    with pytest.raises(StageFailed):
        run_pipeline(Pipeline(slow), store=folder)
    with running_studio(folder, cwd=Path(__file__).parents[2]) as studio:
        open_view(driver, studio, "#/runs/toy", "#resume")
        press(driver, "r")
        assert "Resume toy?" in driver.find_element("css selector", "dialog[open]").text
        press(driver, "\ue00c")  # Escape: nothing is started
        assert driver.find_elements("css selector", "dialog[open], .done-note") == []
        press(driver, "r", "\ue007")
        wait_until(driver, "return document.querySelector('progress[value]') !== null", 120)
        # In one step: a running stage's page replaces its elements between two requests.
        assert "/2000 steps" in driver.execute_script("return document.querySelector('.progress').textContent")
        assert driver.find_elements("css selector", ".diagram .box.running")
        press(driver, "x", "\ue007")
        wait_until(driver, "return document.querySelector('#resume') !== null", 120)
        assert "finished stages and checkpoints are kept" in driver.find_element("css selector", ".done-note").text
        press(driver, "l")
        wait_until(
            driver, "return [...document.querySelectorAll('.tabs button')].some((b) => b.textContent === 'console')"
        )
        assert console(driver) == []


def test_a_lost_server_is_told_and_found_again(driver: Any, store: Path) -> None:
    with running_studio(store) as lost:
        open_view(driver, lost, "#/runs", ".run-link")
        wait_until(driver, "return document.getElementById('connection').textContent === 'live'")
        lost.process.kill()
        wait_until(driver, "return document.getElementById('connection').textContent === 'no connection'")
        assert texts(driver, ".run-link"), "what was shown stays"


def test_report_page_runs_in_its_sandbox(driver: Any, studio: RunningStudio, store: Path) -> None:
    from align.runs.run_page import stored_outline, write_page

    opened = Store.open(store)
    write_page(stored_outline("toy", opened.runs()["toy"]), opened)
    open_view(driver, studio, "#/runs/toy", "a[target=_blank]")
    driver.get(driver.find_element("css selector", "a[target=_blank]").get_attribute("href"))
    assert driver.find_element("css selector", "h1").text == "toy"
    assert driver.find_elements("css selector", ".curve .enlarge"), "its own script ran"
    assert driver.execute_script("return window.origin") == "null"
    driver.execute_script("window.isOld = true; location.reload()")
    wait_until(driver, "return window.isOld === undefined && document.querySelector('footer') !== null")
    assert driver.find_element("css selector", "h1").text == "toy", "a page of a running run reloads itself"
    assert console(driver) == []
