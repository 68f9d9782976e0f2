"""The Chat view in a real browser: two checkpoints and a hostile endpoint, probabilities, scores, a stop, a pair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

from align.store.annotations import AnnotationSet
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.report.browser import CONTRASTS, chromium, console, emulate, needs_browser, resize
from tests.support.studio.chat_store import HOSTILE, VISIBLE, write_chat_store
from tests.support.studio.server import RunningStudio, running_studio

pytestmark = needs_browser
ENTER, ESCAPE, RIGHT = "\ue007", "\ue00c", "\ue014"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_reward: Path) -> Path:
    return write_chat_store(tmp_path_factory.mktemp("chat") / "store", tiny_model, tiny_reward)


@pytest.fixture(scope="module")
def studio(store: Path) -> Iterator[RunningStudio]:
    with running_studio(store) as running:
        yield running


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeChat]:
    server = FakeChat(lambda body: completion(f"<think>{HOSTILE}</think>{HOSTILE}"))
    yield server
    server.stop()


def wait_until(driver: Any, script: str, seconds: float = 60) -> Any:
    return WebDriverWait(driver, seconds).until(lambda browser: browser.execute_script(f"return {script}"))


def open_chat(driver: Any, studio: RunningStudio, query: str = "?models=smoke:sft,smoke:dpo") -> None:
    driver.get("about:blank")
    console(driver)
    driver.get(studio.address)
    driver.execute_script("sessionStorage.clear()")
    driver.get(f"{studio.origin}/#/chat{query}")
    wait_until(driver, "document.getElementById('message') !== null")


def write(driver: Any, text: str) -> None:
    field = driver.find_element("css selector", "#message")
    driver.execute_script("arguments[0].focus(); arguments[0].value = arguments[1]", field, text)
    field.send_keys(ENTER)


def press(driver: Any, *keys: str) -> None:
    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def set_field(driver: Any, name: str, value: str) -> None:
    """Type into a field of the settings, which are opened first."""
    script = """
      const field = document.querySelector(`.chat-setup [name=${arguments[0]}]`);
      field.closest("details").open = true;
      field.value = arguments[1];
      field.dispatchEvent(new Event("input", { bubbles: true }));
    """
    driver.execute_script(script, name, value)


def texts(driver: Any, selector: str) -> list[str]:
    return [element.text for element in driver.find_elements("css selector", selector)]


DONE = "document.querySelectorAll('.reply[aria-busy=false] .numbers:not(:empty)').length === {}"


def test_run_leads_to_a_chat_with_its_models(driver: Any, studio: RunningStudio) -> None:
    driver.get(studio.address)
    driver.get(f"{studio.origin}/#/runs/smoke")
    wait_until(driver, "document.getElementById('chat') !== null")
    press(driver, "m")
    wait_until(driver, "document.getElementById('message') !== null")
    assert driver.execute_script("return location.hash") == "#/chat?models=smoke%3Asft%2Csmoke%3Adpo"
    assert driver.execute_script("return [...document.querySelectorAll('.chip.model')].length") == 2
    assert console(driver) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_two_checkpoints_answer_side_by_side(driver: Any, studio: RunningStudio, width: int, scheme: str) -> None:
    resize(driver, width, 844)
    emulate(driver, scheme)
    open_chat(driver, studio)
    set_field(driver, "max_tokens", "24")
    set_field(driver, "system", HOSTILE)
    select = driver.find_element("css selector", "#reward")
    driver.execute_script(
        "arguments[0].value = 'smoke:reward'; arguments[0].dispatchEvent(new Event('change'))", select
    )
    write(driver, f"Which is longer? {HOSTILE}")
    wait_until(driver, DONE.format(2))
    wait_until(driver, "document.querySelectorAll('.reward-score b').length === 2")
    assert texts(driver, ".model-name") == ["smoke:sft", "smoke:dpo"]
    assert "temperature 0.5 · top-p 0.9 · top-k 20" in texts(driver, ".numbers")[0]
    press(driver, ESCAPE, "p")
    wait_until(driver, "document.querySelectorAll('.token-probabilities').length === 2")
    press(driver, RIGHT)
    reading = driver.find_element("css selector", ".token-reading").text
    assert "2 of 24" in reading
    assert "%" in reading
    assert len(driver.find_elements("css selector", ".reply:first-child .alternatives tbody tr")) == 5
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script(CONTRASTS, "a, label, code, summary, .text, .small") == []
    assert driver.execute_script("return document.querySelectorAll('main img, main script').length") == 0
    assert VISIBLE in driver.find_element("css selector", ".said.user .text").text
    assert driver.title == "Chat · align studio"
    assert console(driver) == []
    emulate(driver, "light")
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_escape_stops_and_editing_asks_again(driver: Any, studio: RunningStudio) -> None:
    open_chat(driver, studio)
    set_field(driver, "max_tokens", "900")
    set_field(driver, "temperature", "0")
    write(driver, "A long story")
    wait_until(driver, "[...document.querySelectorAll('.reply .response')].every((node) => node.textContent)")
    press(driver, ESCAPE)
    wait_until(driver, "document.querySelectorAll('.reply[aria-busy=false]').length === 2")
    assert texts(driver, ".status-word") == ["stopped", "stopped"]
    assert console(driver) == []
    set_field(driver, "max_tokens", "8")
    press(driver, ESCAPE, "e")
    assert driver.execute_script("return document.activeElement.value") == "A long story"
    press(driver, "!", ENTER)
    wait_until(driver, DONE.format(2))
    assert texts(driver, ".said.user .text") == ["A long story!"]
    first = texts(driver, ".reply .response")
    press(driver, ESCAPE, "r")
    wait_until(driver, DONE.format(2))
    assert texts(driver, ".reply .response") == first, "greedy replies are equal"
    write(driver, "And then?")
    wait_until(driver, DONE.format(4))
    driver.refresh()
    wait_until(driver, "document.querySelectorAll('.said.user').length === 2")
    assert console(driver) == []


def test_hostile_answers_of_an_endpoint_become_a_pair(
    driver: Any, studio: RunningStudio, store: Path, fake: FakeChat
) -> None:
    open_chat(driver, studio, "?models=smoke:sft")
    driver.execute_script("document.querySelector('.endpoint-form').closest('details').open = true")
    for name, value in (("url", fake.url), ("model", "good-model")):
        driver.find_element("css selector", f".endpoint-form [name={name}]").send_keys(value)
    driver.find_element("css selector", ".endpoint-form button").click()
    set_field(driver, "max_tokens", "8")
    write(driver, "Hi")
    wait_until(driver, DONE.format(2))
    assert texts(driver, ".reply .response")[1] == VISIBLE
    thought = driver.find_element("css selector", ".reply:nth-child(2) details.thought")
    assert thought.get_attribute("open") is None
    assert VISIBLE in thought.find_element("css selector", ".text").get_property("textContent")
    press(driver, ESCAPE, "a")
    press(driver, *"from-chat", ENTER)
    wait_until(driver, "document.querySelector('.pair-form [role=status] a') !== null")
    (pair,) = AnnotationSet(store, "from-chat").pairs().values()
    assert set(pair.systems or ()) == {"smoke:sft", "good-model"}
    assert HOSTILE in pair.a + pair.b
    assert driver.execute_script("return document.querySelectorAll('main img, main script').length") == 0
    assert driver.title == "Chat · align studio"
    assert console(driver) == []


def test_a_conversation_is_kept_as_json(driver: Any, studio: RunningStudio, tmp_path: Path) -> None:
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    open_chat(driver, studio, "?models=smoke:sft")
    set_field(driver, "max_tokens", "4")
    write(driver, "Hi")
    wait_until(driver, DONE.format(1))
    press(driver, ESCAPE, "k")
    WebDriverWait(driver, 20).until(lambda _: list(tmp_path.glob("chat-*.json")))
    content = json.loads(next(tmp_path.glob("chat-*.json")).read_text())
    assert content["models"] == [{"model": "smoke:sft"}]
    (turn,) = content["turns"]
    assert turn["user"] == "Hi"
    (answer,) = turn["answers"]
    assert answer["settings"]["top_k"] == 20
    assert len(answer["tokens"]) == 4
    assert console(driver) == []
