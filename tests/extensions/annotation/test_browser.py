"""Annotation in a real browser, by keys only: several pairs, a studio that is killed, and hostile answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.extensions.annotation.pairs import read_file_pairs
from align.store.annotations import AnnotationSet
from align.store.store import Store
from tests.support.report.browser import TABLES_FIT, chromium, console, needs_browser, resize
from tests.support.studio.server import RunningStudio, running_studio

pytestmark = needs_browser
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202egpj"
VISIBLE = HOSTILE.replace("\u202e", "\\u202e")
PAIRS = 14


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with the set `helpful-1`, whose answers are hostile."""
    lines = [
        {"prompt": f"Question {number}", "a": f"yes {number}", "b": HOSTILE, "systems": ["new", "old"]}
        for number in range(PAIRS)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    annotations = AnnotationSet(Store.open(tmp_path / "store").root, "helpful-1")
    annotations.add_pairs(read_file_pairs(path).pairs.values())
    annotations.change_settings(duplicates=0.0, overlap=1.0)
    return tmp_path / "store"


def wait_until(driver: Any, script: str, seconds: float = 60) -> Any:
    """Return the value of a script once it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, 0.05).until(lambda browser: browser.execute_script(script))


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def open_questions(driver: Any, studio: RunningStudio, annotator: str) -> None:
    driver.get(studio.address)
    # The reload makes the page read the address anew, also if only the part behind "#" has changed.
    driver.get(f"{studio.origin}/#/annotate/helpful-1/questions?name={annotator}")
    driver.refresh()
    wait_until(driver, "return document.querySelector('.sides') !== null")


PROMPT = "(document.querySelector('.question .prompt .text') || {textContent: ''}).textContent"


def shown_prompt(driver: Any) -> str:
    """Return the prompt on the screen. With two answers on their way the page waits for the studio first."""
    return str(wait_until(driver, f"return {PROMPT}"))


def answer(driver: Any, key: str) -> str:
    """Press a verdict's key, wait until the pair is gone, and return its prompt."""
    before = shown_prompt(driver)
    press(driver, key)
    wait_until(driver, f"return {PROMPT} !== {json.dumps(before)}")
    return before


def saved(store: Path, annotator: str) -> list[str]:
    """Return the prompts that an annotator has answered, in order."""
    annotations = AnnotationSet(store, "helpful-1")
    pairs = annotations.pairs()
    answers = [each for each in annotations.answers() if each.annotator == annotator]
    return [pairs[each.pair].prompt[0]["content"] for each in answers]


def is_saved(driver: Any) -> Any:
    return wait_until(driver, "return document.getElementById('saved').textContent === 'saved ✓'")


def test_keys_annotate_and_a_killed_studio_loses_nothing(driver: Any, store: Path) -> None:
    resize(driver, 1280, 900)
    with running_studio(store) as studio:
        open_questions(driver, studio, "ann")
        port = studio.origin.rpartition(":")[2]
        prompts = [answer(driver, key) for key in "12345"]
        shown_prompt(driver)
        # Notes by keys: Escape and Enter leave the fields, and the verdict takes the notes with it.
        press(driver, "t", "k", "i", "n", "d", "\ue007", "c", "s", "o", "\ue007", "r", "n", "e", "w", "\ue00c")
        prompts.append(answer(driver, "0"))
        is_saved(driver)
        assert saved(store, "ann") == prompts
        last = AnnotationSet(store, "helpful-1").answers()[-1]
        assert (last.verdict, last.tags, last.comment, last.rewrite) == ("both_bad", ["kind"], "so", "new")
        press(driver, "u")
        wait_until(driver, f"return document.querySelector('.prompt .text').textContent === {json.dumps(prompts[-1])}")
        assert saved(store, "ann") == prompts[:-1]
        assert answer(driver, "1") == prompts[-1]
        is_saved(driver)
        # The studio is killed. The next pair was loaded before, so it can be answered without the studio.
        studio.process.kill()
        studio.process.wait()
        prompts.append(answer(driver, "2"))
        wait_until(driver, "return document.getElementById('saved').textContent === '1 not saved yet'")
        wait_until(driver, "return document.querySelector('.problem') !== null")
        assert "sent again" in driver.find_element("css selector", ".problem").text
        assert saved(store, "ann") == prompts[:-1]
    with running_studio(store, "--port", port) as studio:
        # The new studio has a new token, which another tab enters; the answer is still in the browser.
        open_questions(driver, studio, "ann")
        is_saved(driver)
        assert saved(store, "ann") == prompts
        while len(prompts) < PAIRS:
            prompts.append(answer(driver, "4"))
        wait_until(driver, "return document.body.textContent.includes('No question is left')")
        is_saved(driver)
        assert saved(store, "ann") == prompts
    assert sorted(prompts) == sorted(f"Question {number}" for number in range(PAIRS))
    seconds = [each.seconds for each in AnnotationSet(store, "helpful-1").answers()]
    assert all(0 < each < 60 for each in seconds)


def test_hostile_answers_are_texts_and_the_report_is_shown(driver: Any, store: Path) -> None:
    with running_studio(store) as studio:
        open_questions(driver, studio, "bob")
        console(driver)
        answers = "[...document.querySelectorAll('.answer .text')]"
        assert VISIBLE in driver.execute_script(f"return {answers}.map((text) => text.textContent)")
        assert driver.execute_script("return document.querySelectorAll('main img, main script').length") == 0
        for width in (1280, 390):
            resize(driver, width, 844)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        answer(driver, "1")
        is_saved(driver)
        press(driver, "q")
        wait_until(driver, "return document.querySelectorAll('tbody tr').length >= 2")
        assert "new better than old" in driver.find_element("css selector", "main").text
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert driver.execute_script(TABLES_FIT)
        assert driver.title != "owned"
        assert console(driver) == []
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_two_annotators_in_two_windows(driver: Any, store: Path) -> None:
    with running_studio(store) as studio, chromium() as other:
        open_questions(driver, studio, "ann")
        open_questions(other, studio, "bob")
        for key in "12":
            answer(driver, key)
            answer(other, key)
        is_saved(driver)
        is_saved(other)
    assert len(saved(store, "ann")) == len(saved(store, "bob")) == 2
