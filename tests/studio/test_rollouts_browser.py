"""Rollouts and evaluations in a real browser: keys, links, words that are searched, and texts that stay texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.studio.test_browser import open_view, press, texts, wait_until
from tests.support.report.browser import chromium, console, needs_browser, resize
from tests.support.studio.server import RunningStudio, running_studio
from tests.support.studio.stored_rollouts import VISIBLE, write_store

pytestmark = needs_browser
ENTER, RIGHT, END = "\ue007", "\ue014", "\ue010"
TABLE = "#/rollouts/smoke/ppo"
ITEMS = "#/evaluations/smoke/evaluate"
VIEWS = (
    ("#/rollouts", "main table a"),
    (TABLE, ".rollouts tbody tr"),
    (f"{TABLE}/row?id=30--0-0-1", ".tok"),
    (f"{TABLE}/prompt?prompt_id=prompt-0", ".across .answer"),
    ("#/rollouts/smoke/episodes/row?id=1--0-0-0", ".conversation .call"),
    ("#/evaluations", "main table a"),
    (ITEMS, ".items tbody tr"),
    (f"{ITEMS}/0", ".judgment .text"),
)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    with running_studio(write_store(tmp_path_factory.mktemp("rollouts") / "store")) as running:
        yield running


def first_cells(driver: Any) -> list[str]:
    """Return the texts of the first row's cells."""
    script = (
        "return [...document.querySelectorAll('.rollouts tbody tr:first-child td')].map((cell) => cell.textContent)"
    )
    return list(driver.execute_script(script))


@pytest.mark.parametrize("width", [1280, 390])
def test_views_fit_and_hostile_texts_stay_texts(driver: Any, studio: RunningStudio, width: int) -> None:
    resize(driver, width, 844)
    for place, ready in VIEWS:
        open_view(driver, studio, place, ready)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width, place
        assert driver.execute_script("return document.querySelectorAll('main img, main script').length") == 0
        assert driver.title.endswith("· align studio")
        assert console(driver) == [], place
        if place.count("/") > 1:
            assert VISIBLE[:30] in driver.find_element("css selector", "main").get_property("textContent"), place
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_rows_are_reached_by_keys_and_links(driver: Any, studio: RunningStudio) -> None:
    # A link from an alarm or a point on a curve has the update.
    open_view(driver, studio, f"{TABLE}?update=12&sort=score", ".rollouts tbody tr")
    assert texts(driver, ".chips button")[0] == "update 12 ×"
    assert first_cells(driver)[:4:3] == ["12", "8.2"]
    press(driver, "j", "j", ENTER)
    wait_until(driver, "return document.querySelector('.tok') !== null")
    assert "row?id=12--0-1-6" in driver.current_url
    press(driver, "p")
    wait_until(driver, "return document.querySelector('.across ins') !== null")
    # The answer of an update differs from the answer to the left in the number of the update.
    assert [text.strip() for text in texts(driver, ".across .column:nth-child(2) ins")] == ["5"]
    assert [text.strip() for text in texts(driver, ".across .column:nth-child(2) del")] == ["1"]
    press(driver, "u")
    wait_until(driver, "return document.querySelector('.tok') !== null")
    press(driver, "u")
    wait_until(driver, "return document.querySelector('.rollouts [aria-current]') !== null")
    assert texts(driver, ".chips button")[0] == "update 12 ×"
    assert console(driver) == []


def test_conditions_are_in_the_address(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, TABLE, ".rollouts tbody tr")
    assert "240 rollouts" in driver.find_element("css selector", ".status").text
    press(driver, "/", *'"update 7"', END)
    wait_until(driver, "return document.querySelector('.rollouts mark') !== null")
    wait_until(driver, "return document.querySelector('.status').textContent.includes('all searched')")
    assert driver.find_element("css selector", ".status").text.startswith("8 found in 240 of 240 rollouts")
    assert "response_words=%22update+7%22" in driver.current_url
    driver.find_element("css selector", ".chip.remove").click()
    wait_until(driver, "return document.querySelectorAll('.rollouts tbody tr').length === 50")
    assert "response_words" not in driver.current_url
    driver.find_element("xpath", "//th//button[starts-with(., 'KL')]").click()
    wait_until(driver, "return location.hash.includes('sort=kl')")
    driver.refresh()
    wait_until(driver, "return document.querySelector('[aria-sort=descending]') !== null")
    assert first_cells(driver)[0] == "30"
    assert console(driver) == []


def test_point_of_the_curve_shows_its_rows(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, TABLE, ".mean-curve")
    curve = driver.find_element("css selector", ".mean-curve")
    driver.execute_script("arguments[0].focus()", curve)
    curve.send_keys("\ue011", RIGHT, RIGHT, ENTER)  # Home
    wait_until(driver, "return location.hash.includes('first_update=3&last_update=3')")
    wait_until(driver, "return document.querySelectorAll('.rollouts tbody tr').length === 8")
    assert console(driver) == []


def test_tokens_have_their_numbers_at_the_focus(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, f"{TABLE}/row?id=30--0-0-1", ".tok")
    press(driver, "x", RIGHT, RIGHT)
    reading = driver.find_element("css selector", ".token-reading").text
    assert "KL\n0.2 nats" in reading
    assert "Value\n−0.4" in reading
    assert "place\n3 of 9, id 2" in reading
    assert driver.execute_script("return document.activeElement.className") == "tok l1"
    press(driver, "c")
    assert driver.execute_script("return document.activeElement.className") == "tok l4"
    # Advantages, then values, which are below zero, then masks.
    press(driver, "c")
    assert driver.execute_script("return document.activeElement.className") == "tok l1 below"
    press(driver, "c")
    assert texts(driver, ".tok.mask-unlearned")[0].strip() == "sampled, not in the loss"
    assert console(driver) == []


def test_wins_and_judgments_of_an_evaluation(driver: Any, studio: RunningStudio) -> None:
    open_view(driver, studio, f"{ITEMS}?first=ppo&second=sft", ".items tbody tr")
    assert [text.split()[-1] for text in texts(driver, ".updates button")] == ["60", "30", "10", "20"]
    press(driver, "o", "o")
    wait_until(driver, "return location.hash.includes('outcome=loss')")
    wait_until(driver, "return document.querySelectorAll('.items tbody tr').length === 10")
    press(driver, "j", ENTER)
    wait_until(driver, "return document.querySelector('.across ins') !== null")
    first = driver.find_element("css selector", "h1").text
    press(driver, "j")
    wait_until(driver, f"return (document.querySelector('h1') || {{textContent: '{first}'}}).textContent !== '{first}'")
    press(driver, "u")
    wait_until(driver, "return document.querySelectorAll('.items tbody tr').length === 10")
    open_view(driver, studio, f"{ITEMS}/0", ".judgment")
    assert texts(driver, ".judgment h3") == ["ppo against sft: ppo wins"]
    assert len(texts(driver, ".judgment .answer")) == 2
    assert console(driver) == []


@contextmanager
def held_requests(driver: Any, pattern: str) -> Iterator[None]:
    """Hold the requests of a pattern back until the context ends."""
    driver.execute_cdp_cmd("Fetch.enable", {"patterns": [{"urlPattern": pattern}]})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Fetch.disable", {})


@pytest.mark.parametrize(("table", "request_of_view"), [(TABLE, "*/api/rollouts"), (ITEMS, "*/api/evaluations")])
def test_back_works_while_a_page_loads(driver: Any, studio: RunningStudio, table: str, request_of_view: str) -> None:
    open_view(driver, studio, table, ".rollouts tbody tr")
    with held_requests(driver, request_of_view):
        press(driver, "j", ENTER)
        wait_until(driver, f"return location.hash !== '{table}' && !document.querySelector('.rollouts')")
        press(driver, "u")
        wait_until(driver, f"return location.hash.startsWith('{table}') && !/row|evaluate\\//.test(location.hash)")
    wait_until(driver, "return document.querySelector('.rollouts tbody tr') !== null")
    assert console(driver) == []


@pytest.mark.parametrize(
    ("table", "request_of_page", "key"), [(TABLE, "/row?", "next row"), (ITEMS, "/items/", "open the item")]
)
def test_page_that_loads_late_sets_no_keys(
    driver: Any, studio: RunningStudio, table: str, request_of_page: str, key: str
) -> None:
    open_view(driver, studio, table, ".rollouts tbody tr")
    with held_requests(driver, f"*{request_of_page}*"):
        press(driver, "j", ENTER)
        wait_until(driver, "return document.querySelector('.rollouts') === null")
        press(driver, "u")
        wait_until(driver, "return document.querySelector('.rollouts tbody tr') !== null")
    received = f"performance.getEntriesByType('resource').some((entry) => entry.name.includes('{request_of_page}'))"
    wait_until(driver, f"return {received}")
    press(driver, "?")
    assert key in driver.find_element("css selector", "dialog[open]").text
    press(driver, "\ue00c")
    assert console(driver) == []
