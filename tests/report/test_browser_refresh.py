"""The page of a run that goes on, in a real browser: it reloads itself, and keeps what its reader has open."""

from __future__ import annotations

import json
import shutil

from align.report.run.run_report import write_report
from align.store.artifacts import Artifact, Kind
from tests.support.report.browser import console, needs_browser, open_page
from tests.support.report.example_run import write_artifact

pytestmark = needs_browser
RUNNING = {"stage": "sft", "message": "runs", "status": "running"}


def test_page_of_a_running_run_reloads_and_keeps_folds(driver, tmp_path):
    model = write_artifact(tmp_path, "model", Kind.MODEL)
    page = write_report([model], None, tmp_path / "r.html", RUNNING, title="before", refresh=1)
    open_page(driver, page)
    fold = "document.querySelector('#stages details')"
    driver.execute_script(f"{fold}.open = true; document.getElementById('hold').click()")
    write_report([model], None, page, RUNNING, title="after", refresh=1)
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
    open_outdated(driver, [model], tmp_path)
    driver.execute_script("location.reload(); document.getElementById('hold').click()")
    driver.execute_async_script("setTimeout(arguments[0], 500)")
    assert driver.title == "before"
    driver.find_element("css selector", "#hold").click()
    driver.execute_script("location.reload()")  # as its timer does: this one comes
    assert wait_for_page(driver, "after", "true")


def test_similar_folds_differ_after_a_reload(driver, tmp_path):
    stages = [write_artifact(tmp_path, name, Kind.POLICY) for name in ("dpo_1", "dpo_2")]
    open_outdated(driver, stages, tmp_path)
    folds = "[...document.querySelectorAll('#stages details.stage')]"
    # What is opened while a reload is on its way is open after it.
    driver.execute_script(f"location.reload(); {folds}[1].open = true")
    assert wait_for_page(driver, "after", f"{folds}.map((fold) => fold.open)") == [False, True]


def test_fold_is_saved_before_the_page_hides(driver, tmp_path):
    open_outdated(driver, [write_artifact(tmp_path, "dpo", Kind.POLICY)], tmp_path)
    driver.execute_script("document.querySelector('#stages details.stage').open = true")
    stored = driver.execute_async_script("setTimeout(() => arguments[0](Object.values(sessionStorage)), 100)")
    assert any(json.loads(value) for value in stored)


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
    open_outdated(driver, [evaluate], tmp_path, card)
    folds = "[...document.querySelectorAll('#samples #list details')]"
    count = driver.execute_script(f"{folds}[1].open = true; return {folds}.length")
    assert count > 2
    driver.execute_script("location.reload()")
    is_open = wait_for_page(driver, "after", f"{folds}.map((fold) => fold.open)")
    assert is_open == [index == 1 for index in range(count)]


def open_outdated(driver, artifacts, folder, card=None):
    """Open the page of a run that has written a newer one since, which a reload shows."""
    page = write_report(artifacts, card, folder / "r.html", RUNNING, title="before", refresh=60)
    open_page(driver, page)
    write_report(artifacts, card, page, RUNNING, title="after", refresh=60)


def wait_for_page(driver, title, expression):
    """Wait until the page of this title has loaded; return the value that a JavaScript expression has on it.

    Both are read in one call: a page that reloads itself may be another one at the next call.
    """
    from selenium.webdriver.support.ui import WebDriverWait

    is_there = f"document.title === '{title}' && document.readyState === 'complete'"
    script = f"return {is_there} ? [{expression}] : null"
    return WebDriverWait(driver, 20).until(lambda browser: browser.execute_script(script))[0]
