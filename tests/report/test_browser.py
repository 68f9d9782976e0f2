"""The page in a real browser, where there is one: no script of a model runs, the page's own does, at both widths."""

from __future__ import annotations

import copy
import json
import re

import pytest

from align.environments.journal import CallResult
from align.environments.results import Scores
from align.report.run.run_report import write_report
from align.store.artifacts import Kind
from tests.support.report.browser import CONTRASTS, console, emulate, needs_browser, open_page, requests, resize
from tests.support.report.example_episodes import episode_line, play
from tests.support.report.example_run import HOSTILE, write_artifact
from tests.support.stored_rollouts import write_lines

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(full_run, tmp_path_factory):
    """The page of a full run."""
    artifacts, card = full_run
    return write_report(artifacts, card, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(driver, page):
    """The page, open, its console and its requests not yet read."""
    resize(driver, 1280, 900)
    open_page(driver, page)
    yield page
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def all_of(driver, selector):
    return driver.find_elements("css selector", selector)


def first(driver, selector):
    return driver.find_element("css selector", selector)


def choose(driver, name, value):
    script = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'));"
    )
    driver.execute_script(script, name, value)


def titles(driver):
    return [element.text for element in all_of(driver, "#list .sample .turn:first-child .text")]


def test_it_loads_without_an_error_and_without_a_request(driver, opened):
    assert first(driver, "#shown").text == "10 of 66 prompts"  # our own script ran, under the page's policy
    assert console(driver) == []
    assert requests(driver, opened) == []


def test_a_hostile_sample_stays_text(driver, opened):
    first = all_of(driver, "#list .sample")[0]
    assert "<script>document.title" in first.text  # it is there to be read, and first: ppo gained most on it
    assert "\\u202egnp.exe" in first.text
    assert driver.title == "Alignment report"
    assert all_of(driver, "#list img, #list script, #list b") == []


def test_what_the_policy_must_stop_is_seen_by_the_console(driver, opened):
    driver.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    driver.execute_async_script("setTimeout(arguments[0], 200)")
    assert any("Content Security Policy" in line for line in console(driver))  # so its silence elsewhere says something


def test_figures_are_drawn(driver, opened):
    sizes = driver.execute_script(
        "return [...document.querySelectorAll('figure svg')].filter((s) => s.checkVisibility()).map((s) => {"
        "const b = s.getBBox(); return [s.getAttribute('aria-label'), b.width, b.height]; })"
    )
    assert len(sizes) > 25
    assert [label for label, width, height in sizes if width < 50 or height < 20] == []


def test_filters_and_order(driver, opened):
    choose(driver, "task", "ifeval")
    assert first(driver, "#shown").text == "10 of 40 prompts"
    assert titles(driver)[:3] == ["instruction 0", "instruction 1", "instruction 2"]  # where ppo did better
    sources = [element.text for element in all_of(driver, "#source option")]
    assert sources == ["all", "length"]
    choose(driver, "find", "DID 17")
    assert titles(driver) == ["instruction 17"]
    choose(driver, "find", "")
    first(driver, "#more").click()
    assert len(titles(driver)) == 20
    choose(driver, "task", "prompts")
    choose(driver, "sort", "up:ppo")
    assert HOSTILE[:8] in titles(driver)[0]
    choose(driver, "sort", "down:ppo")
    assert HOSTILE[:8] not in titles(driver)[0]
    choose(driver, "source", "<b>lists</b>")
    assert first(driver, "#shown").text == "10 of 24 prompts"


def test_turns_of_a_conversation(driver, opened):
    choose(driver, "task", "mt")
    text = all_of(driver, "#list .answer")[0].text
    assert text.index("first reply") < text.index("now shorter") < text.index("second reply")


def test_numbers_by_token(driver, opened):
    from selenium.webdriver import ActionChains

    card = next(element for element in all_of(driver, "#list .answer") if element.text.startswith("ppo"))
    kl, value = card.find_elements("css selector", ".heat-buttons button")
    plain = card.find_element("css selector", ".text").text
    kl.click()
    box = card.find_element("css selector", ".text")
    assert kl.get_attribute("aria-pressed") == "true"
    assert "document.title" in box.text  # hostile tokens are text too
    assert driver.title == "Alignment report"
    tokens = box.find_elements("css selector", ".tok")
    widths = {element.value_of_css_property("text-decoration-thickness") for element in tokens}
    styles = {element.value_of_css_property("text-decoration-style") for element in tokens}
    assert len(widths) > 3  # tells sizes apart without color
    assert styles == {"solid", "dotted"}  # and signs
    ActionChains(driver).move_to_element(card.find_element("css selector", ".title")).perform()  # off the tokens
    driver.execute_script("arguments[0].focus()", tokens[1])
    reading = card.find_element("css selector", ".reading")
    assert "token 2 of" in reading.text
    assert "KL −0.50 nats" in reading.text
    tokens[1].send_keys("\ue014")  # arrow right
    assert "token 3 of" in reading.text
    assert "KL 0.00 nats" in reading.text
    position = value.rect
    driver.execute_script("arguments[0].textContent = 'a long token '.repeat(40)", reading)
    assert value.rect == position  # a click hits the button that was aimed at, whatever is read meanwhile
    value.click()
    ActionChains(driver).move_to_element(card.find_element("css selector", ".title")).perform()
    driver.execute_script("arguments[0].focus()", card.find_elements("css selector", ".tok")[2])
    assert "value +0.20" in card.find_element("css selector", ".reading").text
    value.click()
    assert card.find_element("css selector", ".text").text == plain
    assert card.find_elements("css selector", ".reading, .tok") == []


def test_rollouts_of_training(driver, opened):
    choose(driver, "task", "rollouts ppo")
    card = first(driver, "#list .answer")
    assert [button.text for button in card.find_elements("css selector", "button")] == [
        "KL by token", "Value by token", "Advantage by token",
    ]  # fmt: skip


def test_tokens_of_the_environment_are_gray(driver, tmp_path):
    ppo = write_artifact(tmp_path, "ppo", Kind.POLICY)
    prompt = [{"role": "user", "content": "1+1?"}]
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    script = [call, CallResult(HOSTILE, "raised"), "2", Scores(0.5, {}, [0.0, 0.5])]
    line = episode_line(play(prompt, script), prompt)
    write_lines(ppo.path / "rollouts", [line])
    page = write_report([ppo], None, tmp_path / "r.html")
    resize(driver, 390, 844)
    open_page(driver, page)
    card = first(driver, "#list .answer")
    plain = card.find_element("css selector", ".conversation").text
    assert 'add({"a": 1})' in plain and "✗ the tool raised" in plain and "<script>document.title" in plain
    assert "turn 2 · score 0.500" in plain
    assert "2 turns · 1 call · 1 × the tool raised" in card.text
    assert "■ ended by the model or its environment" in card.text
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    card.find_element("css selector", ".heat-buttons button").click()
    gray = "".join(each.get_property("textContent") for each in all_of(driver, ".tok.env"))
    assert gray.startswith("<Error: <script>") and gray.endswith(">")
    colors = {each.value_of_css_property("background-color") for each in all_of(driver, ".tok.env")}
    assert len(colors) == 1 and colors != {first(driver, ".tok:not(.env)").value_of_css_property("background-color")}
    driver.execute_script("arguments[0].focus()", first(driver, ".tok.env"))
    assert card.find_element("css selector", ".reading").text.endswith("from the environment")
    card.find_element("css selector", ".heat-buttons button").click()
    assert card.find_element("css selector", ".conversation").text == plain
    choose(driver, "find", "GNP.EXE")  # words of a result are searched
    assert first(driver, "#shown").text == "1 of 1 prompts"
    assert (driver.title, console(driver), requests(driver, page)) == ("Alignment report", [], [])


def test_held_out_prompts_are_followed_through_the_updates(driver, tmp_path):
    ppo = write_artifact(tmp_path, "ppo", Kind.POLICY)
    lines = [
        {"update": update, "prompt": HOSTILE, "response": f"{HOSTILE} {update}", "score": update / 10, "tokens": 3}
        for update in (0, 2, 4)
    ]
    write_lines(ppo.path / "validations", lines)
    page = write_report([ppo], None, tmp_path / "r.html")
    open_page(driver, page)
    assert first(driver, "#shown").text == "1 of 1 prompts"
    cards = [card.text for card in all_of(driver, "#list .answer")]
    assert [card.splitlines()[0] for card in cards] == [
        "before training score 0.00", "after update 2 score 0.20", "after update 4 score 0.40",
    ]  # fmt: skip
    assert all("<script>document.title" in card for card in cards)
    assert (driver.title, console(driver), requests(driver, page)) == ("Alignment report", [], [])


def test_values_are_read_off_a_curve(driver, opened):
    figures = all_of(driver, "figure.curve")
    pair = next(element for element in figures if "test_loss" in element.get_attribute("aria-label"))
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", pair)
    from selenium.webdriver import ActionChains

    svg = pair.find_element("css selector", "svg")
    width = svg.size["width"]
    ActionChains(driver).move_to_element_with_offset(svg, round(width * (0.17 + 0.8 / 22) - width / 2) + 1, 0).perform()
    reading = pair.find_element("css selector", ".reading")
    assert reading.text == "step 0 · loss 1 · test_loss 1"
    assert len(pair.find_elements("css selector", ".crosshair line")) == 1
    driver.execute_script("arguments[0].focus()", pair)
    pair.send_keys("\ue014")
    assert reading.text == "step 1 · loss 0.5 · test_loss 0.5"
    ppo = [
        element
        for element in figures
        if element.find_elements("css selector", "[id*=none], svg") and element is not pair
    ][-1]
    driver.execute_script("arguments[0].focus()", ppo)
    ppo.send_keys("\ue014", "\ue014")
    shown = [element.text for element in all_of(driver, "figure.curve .reading") if element.text]
    assert len(shown) == 4  # ppo's own four, and no longer sft's
    assert all(text.startswith("step 1 · ") for text in shown)


def test_a_curve_is_enlarged_zoomed_and_smoothed(driver, opened):
    from selenium.webdriver import ActionChains

    figure = next(each for each in all_of(driver, "figure.curve") if "test_loss" in each.get_attribute("aria-label"))
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
    driver.execute_script("arguments[0].focus()", figure)
    figure.send_keys("\ue007")  # Enter
    dialog = first(driver, "dialog.curve-view")
    assert dialog.get_attribute("open") is not None
    assert dialog.find_element("css selector", "h3").text == "sft: loss"
    assert [key.text for key in dialog.find_elements("css selector", ".curve-legend span")] == ["loss", "test_loss"]
    plot = dialog.find_element("css selector", "svg[role=img]")

    def steps():
        return [float(number) for number in re.findall("[0-9.]+", plot.get_attribute("aria-label").split("steps")[1])]

    def lines():
        return [line.get_attribute("d") for line in plot.find_elements("css selector", "path.line")]

    assert steps() == [0, 29]
    assert len(lines()) == 2
    width = plot.size["width"]
    drag = ActionChains(driver).move_to_element_with_offset(plot, round(-0.2 * width), 0).click_and_hold()
    drag.move_by_offset(round(0.2 * width), 0).release().perform()
    low, high = steps()
    assert 5 < low < 9 and 13 < high < 16  # the dragged part, not the whole run
    dialog.send_keys("0")
    assert steps() == [0, 29]
    before = lines()
    smoothing = "const s = arguments[0]; s.value = '0.9'; s.dispatchEvent(new Event('input'));"
    driver.execute_script(smoothing, dialog.find_element("css selector", "input[type=range]"))
    assert len(lines()) == 4  # what was logged stays behind its mean
    # Debiased: the first point of the mean is the first value; few held-out values are not smoothed.
    heights = [[float(pair.split(" ")[1]) for pair in re.split("[ML]", line)[1:]] for line in lines()]
    assert heights[0][0] == pytest.approx(heights[1][0], abs=0.2)
    assert heights[1][5] < heights[0][5]  # the mean of a falling loss is above it, which is higher up
    assert heights[2] == heights[3]
    assert before != lines()
    driver.execute_script("arguments[0].click()", dialog.find_element("css selector", "input[type=checkbox]"))
    labels = [element.text for element in plot.find_elements("css selector", "text")]
    assert "0.1" in labels and "1" in labels
    dialog.send_keys("\ue00c")  # Escape
    assert dialog.get_attribute("open") is None
    assert console(driver) == []


def test_late_steps_are_read_with_all_their_digits(driver, tmp_path):
    sft = write_artifact(tmp_path, "sft", Kind.POLICY)
    points = [{"event": "metrics", "step": step, "loss": 1.0} for step in (12345, 12346, 12347)]
    (sft.path / "events.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    open_page(driver, write_report([sft], None, tmp_path / "r.html"))
    figure = first(driver, "figure.curve")
    driver.execute_script("arguments[0].focus()", figure)
    figure.send_keys("\ue014")  # arrow right
    assert figure.find_element("css selector", ".reading").text == "step 12345 · 1"
    figure.send_keys("\ue007")  # Enter
    plot = first(driver, "dialog.curve-view svg[role=img]")
    assert plot.get_attribute("aria-label") == "sft: loss, steps 12345 to 12347"
    assert {"12345.0", "12346.0", "12347.0"} <= {label.text for label in plot.find_elements("css selector", "text")}
    assert console(driver) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(driver, opened, width):
    resize(driver, width, 844)
    driver.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert driver.execute_script("return window.innerWidth") == width
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert console(driver) == []


@pytest.fixture(scope="module")
def page_of_six(full_run, tmp_path_factory):
    """The page of a run whose evaluation has a sixth system."""
    artifacts, card = full_run
    card = copy.deepcopy(card)
    card["policies"].append("dpo")
    card["systems"].append({**card["systems"][2], "name": "dpo", "key": "k9"})
    card["estimates"]["dpo"] = card["estimates"]["ppo"]
    card["differences"] += [{**row, "policy": "dpo"} for row in card["differences"] if row["policy"] == "ppo"]
    return write_report(artifacts, card, tmp_path_factory.mktemp("six") / "report.html")


@pytest.mark.parametrize(("width", "columns"), [(1280, 6), (900, 3), (390, 2)])
def test_six_systems_stand_in_even_rows(driver, page_of_six, width, columns):
    resize(driver, width, 900)
    open_page(driver, page_of_six)
    boxes = [element.rect for element in all_of(driver, ".heads .head")]
    assert len(boxes) == 6
    assert len({round(box["x"]) for box in boxes}) == columns
    assert len({round(box["width"]) for box in boxes}) == 1
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    if width == 1280:
        table = "document.querySelector('#scorecard table.score').parentElement"
        assert driver.execute_script(f"return {table}.scrollWidth <= {table}.clientWidth + 1")
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_table_that_goes_on_says_so_until_it_is_scrolled(driver, opened):
    table = "document.querySelector('#scorecard table.score').parentElement"
    state = f"const box = {table}; return [box.classList.contains('goes-on'), box.previousElementSibling.hidden];"
    wait = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
    assert driver.execute_script(state) == [False, True]
    resize(driver, 390, 844)
    driver.execute_async_script(wait)
    assert driver.execute_script(state) == [True, False]
    driver.execute_script(f"{table}.scrollLeft = 40")
    driver.execute_async_script(wait)
    assert driver.execute_script(state) == [True, True]
    # The metric's name stays in view.
    left = f"return {table}.querySelector('tbody th[scope=row]').getBoundingClientRect().left"
    assert driver.execute_script(left) >= 0
    driver.execute_script(f"{table}.scrollLeft = 1e6")
    driver.execute_async_script(wait)
    assert driver.execute_script(state) == [False, True]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(driver, opened, scheme):
    emulate(driver, scheme)
    try:
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(245, 246, 248)", "dark": "rgb(15, 20, 27)"}[scheme]
        assert driver.execute_script(CONTRASTS) == []
        emulate(driver, scheme, "print")
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert driver.execute_script(CONTRASTS) == []
    finally:
        emulate(driver, "light")


def test_pages_of_unfinished_and_empty_runs(driver, tmp_path):
    model = write_artifact(tmp_path, "model", Kind.MODEL)
    failed = {"stage": "sft", "message": HOSTILE, "pending": ["evaluate"], "inputs": ["model"]}
    for number, (artifacts, failure) in enumerate(
        (([model], failed), ([model], {**failed, "status": "running"}), ([], None))
    ):
        page = write_report(artifacts, None, tmp_path / f"{number}.html", failure)
        open_page(driver, page)
        assert driver.title == "Alignment report"
        assert console(driver) == []
        assert requests(driver, page) == []
