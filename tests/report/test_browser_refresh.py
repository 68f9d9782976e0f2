"""The page of a run that goes on, in a real browser: it reloads itself, and keeps what its reader has open."""

from __future__ import annotations

import json
import shutil

from align.report.run.run_report import write_report
from align.store.artifacts import Artifact, Kind
from tests.support.report.browser import console, needs_browser, open_page
from tests.support.report.example_run import write_artifact

pytestmark = needs_browser


def test_page_of_a_running_run_reloads_and_keeps_folds(driver, tmp_path):
    model = write_artifact(tmp_path, "model", Kind.MODEL)
    running = {"stage": "sft", "message": "runs", "status": "running"}
    page = write_report([model], None, tmp_path / "r.html", running, title="before", refresh=1)
    open_page(driver, page)
    fold = "document.querySelector('#stages details')"
    driver.execute_script(f"{fold}.open = true; document.getElementById('hold').click()")
    write_report([model], None, page, running, title="after", refresh=1)
    driver.execute_async_script("setTimeout(arguments[0], 1300)")
    assert driver.title == "before"  # paused by its button
    driver.find_element("css selector", "#hold").click()
    assert wait_for_page(driver, "after", f"{fold}.open")
    assert console(driver) == []
    # The last page of the run stays as it is.
    write_report([model], None, page, None, title="done")
    assert wait_for_page(driver, "done", "document.querySelector('#hold') === null")


def test_a_pause_stops_a_reload_that_is_on_its_way(driver, tmp_path):
    model = write_artifact(tmp_path, "model", Kind.MODEL)
    running = {"stage": "sft", "message": "runs", "status": "running"}
    page = write_report([model], None, tmp_path / "r.html", running, title="before", refresh=60)
    open_page(driver, page)
    write_report([model], None, page, running, title="after", refresh=60)
    driver.execute_script("location.reload(); document.getElementById('hold').click()")
    driver.execute_async_script("setTimeout(arguments[0], 500)")
    assert driver.title == "before"
    driver.find_element("css selector", "#hold").click()
    driver.execute_script("location.reload()")  # as its timer does: this one comes
    assert wait_for_page(driver, "after", "true")


def test_similar_folds_differ_after_a_reload(driver, tmp_path):
    stages = [write_artifact(tmp_path, name, Kind.POLICY) for name in ("dpo_1", "dpo_2")]
    running = {"stage": "evaluate", "message": "runs", "status": "running"}
    page = write_report(stages, None, tmp_path / "r.html", running, title="before", refresh=60)
    open_page(driver, page)
    write_report(stages, None, page, running, title="after", refresh=60)
    folds = "[...document.querySelectorAll('#stages details.stage')]"
    # What is opened while a reload is on its way is open after it.
    driver.execute_script(f"location.reload(); {folds}[1].open = true")
    assert wait_for_page(driver, "after", f"{folds}.map((fold) => fold.open)") == [False, True]


def test_open_answers_stay_open_after_a_reload(driver, full_run, tmp_path):
    artifacts, card = full_run
    evaluate = next(artifact for artifact in artifacts if (artifact.path / "samples.jsonl").is_file())
    folder = tmp_path / "evaluate"
    shutil.copytree(evaluate.path, folder)
    lines = [json.loads(line) for line in (evaluate.path / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line["responses"] = {name: answers * 2 for name, answers in line["responses"].items()}
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate = Artifact(evaluate.stage, evaluate.kind, folder, evaluate.record)
    running = {"stage": "sft", "message": "runs", "status": "running"}
    page = write_report([evaluate], card, tmp_path / "r.html", running, title="before", refresh=60)
    open_page(driver, page)
    write_report([evaluate], card, page, running, title="after", refresh=60)
    folds = "[...document.querySelectorAll('#samples #list details')]"
    count = driver.execute_script(f"{folds}[1].open = true; return {folds}.length")
    assert count > 2
    driver.execute_script("location.reload()")
    is_open = wait_for_page(driver, "after", f"{folds}.map((fold) => fold.open)")
    assert is_open == [index == 1 for index in range(count)]


def wait_for_page(driver, title, expression):
    """Wait until the page of this title has loaded; return the value that a JavaScript expression has on it.

    Both are read in one call: a page that reloads itself may be another one at the next call.
    """
    from selenium.webdriver.support.ui import WebDriverWait

    is_there = f"document.title === '{title}' && document.readyState === 'complete'"
    script = f"return {is_there} ? [{expression}] : null"
    return WebDriverWait(driver, 20).until(lambda browser: browser.execute_script(script))[0]
