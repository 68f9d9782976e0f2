"""The studio's Data view through its API: pages of rows, dropped rows, masks by token, findings, comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait
from starlette.testclient import TestClient

from align import Pipeline
from align.models.built_in import make_tiny_tokenizer
from align.runner.runner import run_pipeline
from align.store.leases import write_run
from align.store.store import Store
from tests.support.records import put_record
from tests.support.report.browser import TABLES_FIT, chromium, console, needs_browser, resize
from tests.support.studio.client import open_client
from tests.support.studio.server import running_studio

HOSTILE = "<img src=x onerror=alert(1)>\u202e"
VISIBLE = HOSTILE.replace("\u202e", "\\u202e")


def write_recipe(folder: Path, name: str, answers: list[str]) -> Path:
    """Write a recipe of instructions, whose last record repeats the first."""
    records = [
        {"instruction": f"Question {number}", "input": "", "output": answer} for number, answer in enumerate(answers)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, records[0]]))
    source = {"type": "files", "name": "things", "license": "CC0-1.0", "format": "alpaca", "paths": [str(path)]}
    recipe = {"kind": "instructions", "sources": [source], "steps": [{"type": "exact_duplicates"}], "test_size": 0}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"near_duplicate_prompts": None}))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two builds, a stage with a tokenizer, and findings of a stage that learned; read-only by agreement."""
    folder = tmp_path_factory.mktemp("data")
    root = folder / "store"
    answers = ["first", HOSTILE, *(f"answer {number}" for number in range(28))]
    for name, texts in (("one", answers), ("two", [*answers[:-1], "another answer"])):
        recipe = write_recipe(folder, name, texts)
        run_pipeline(Pipeline({"name": name, "stages": {"data": {"recipe": str(recipe)}}}), store=root)
    stages: dict[str, Any] = dict(Store.open(root).runs()["one"]["stages"])
    model = root / "model" / ("d" * 12) / "model"
    model.mkdir(parents=True)
    make_tiny_tokenizer().save_pretrained(model)
    put_record(model.parent, kind="model", stage="model", makes="ModelCheckpoint", key="d" * 64)
    place = {"split": "train", "row": 2}
    finding = {"name": "no-end", "severity": "error", "count": 1, "of": 30, "what": "w", "remedy": "r"}
    sft = root / "sft" / ("e" * 12)
    sft.mkdir(parents=True)
    content = {"findings": [finding | {"examples": [{"place": place, "excerpt": HOSTILE}]}]}
    (sft / "findings.json").write_text(json.dumps(content))
    put_record(sft, kind="sft", stage="sft", makes="PolicyCheckpoint", key="e" * 64)
    stages |= {"model": {"kind": "model", "key": "d" * 64}, "sft": {"kind": "sft", "key": "e" * 64}}
    write_run(root, "trained", stages, {"stages": {"data": {}, "model": {}, "sft": {"model": "model", "data": "data"}}})
    return root


@pytest.fixture
def client(store: Path) -> TestClient:
    return open_client(store)


def get(client: TestClient, place: str, status: int = 200, **query: Any) -> Any:
    answer = client.get(f"/api/data{place}", params=query)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_builds_of_all_runs_are_listed(client: TestClient) -> None:
    stages = {(each["run"], each["stage"]): each for each in get(client, "")["stages"]}
    assert stages.keys() == {("one", "data"), ("two", "data"), ("trained", "data")}
    assert stages["one", "data"]["splits"] == {"train": 30, "test": 0}
    assert stages["one", "data"]["dropped"] == 1


def test_build_has_ledger_models_and_findings(client: TestClient) -> None:
    content = get(client, "/trained/data")
    assert [source["license"] for source in content["sources"]] == ["cc0-1.0"]
    assert sum(step["lost"] for step in content["steps"]) == 1
    assert content["models"] == ["model"]
    ((stage,), (finding,)) = zip(*((each["stage"], each["findings"][0]) for each in content["findings"]), strict=True)
    assert stage == "sft" and finding["examples"][0]["place"] == {"split": "train", "row": 2}


def test_rows_come_in_pages(client: TestClient) -> None:
    first = get(client, "/one/data/rows", limit=20)
    second = get(client, "/one/data/rows", limit=20, offset=20)
    assert first["matches"] == 30 and [len(first["rows"]), len(second["rows"])] == [20, 10]
    rows = [*first["rows"], *second["rows"]]
    assert [row["number"] for row in rows] == list(range(30))
    assert HOSTILE in [row["answers"][0]["text"] for row in rows]
    assert {turn["role"] for row in rows for turn in row["turns"]} == {"user"}
    by_id = get(client, "/one/data/rows", id=rows[7]["id"])
    assert [row["number"] for row in by_id["rows"]] == [7]
    assert get(client, "/one/data/rows", source="another")["matches"] == 0
    get(client, "/one/data/rows", 422, limit=1000)


def test_dropped_rows_have_step_and_reason(client: TestClient) -> None:
    page = get(client, "/one/data/rows", split="dropped")
    (row,) = page["rows"]
    assert "Question 0" in row["text"] and row["reason"] and row["step"]
    assert get(client, "/one/data/rows", split="dropped", reason=row["reason"])["matches"] == 1
    assert get(client, "/one/data/rows", split="dropped", reason="another")["matches"] == 0


def test_tokens_show_what_is_trained(client: TestClient) -> None:
    row = get(client, "/trained/data/rows/train/0", model="model")
    (view,) = row["views"]
    trained = "".join(piece["text"] for piece in view["pieces"] if piece["trained"])
    everything = "".join(piece["text"] for piece in view["pieces"])
    texts = get(client, "/trained/data/rows/train/0")
    answer = texts["answers"][0]["text"]
    assert answer in trained and texts["turns"][0]["text"] in everything and "Question" not in trained
    assert 0 < view["trained"] < view["tokens"]
    (paged,) = get(client, "/trained/data/rows", model="model", limit=1)["rows"]
    assert paged["views"] == row["views"]


def test_two_builds_are_compared(client: TestClient) -> None:
    same = get(client, "/compare", a_run="one", a_stage="data", b_run="trained", b_stage="data")
    assert same["identical"]
    other = get(client, "/compare", a_run="one", a_stage="data", b_run="two", b_stage="data")
    (group,) = [each for each in other["groups"] if each["split"] == "train"]
    assert group["unchanged"] == 29 and group["new answer"] + group["changed"] == 1
    assert other["a"].startswith("one · data") and "/" not in other["a"]


@needs_browser
def test_build_is_shown_by_keys_and_texts_stay_texts(store: Path) -> None:
    with running_studio(store) as studio, chromium() as driver:

        def wait(script: str) -> Any:
            return WebDriverWait(driver, 60, 0.05).until(lambda browser: browser.execute_script(script))

        def press(key: str) -> None:
            ActionChains(driver).send_keys(key).perform()

        driver.get(studio.address)
        driver.get(f"{studio.origin}/#/data/trained/data")
        driver.refresh()
        wait("return document.querySelectorAll('article.sample').length === 10")
        console(driver)
        shown = "[...document.querySelectorAll('article .text')].map((text) => text.textContent)"
        assert VISIBLE in wait(f"return {shown}")
        press("n")
        wait("return document.querySelector('.pager .num').textContent === '11 to 20 of 30'")
        press("d")
        wait("return document.querySelectorAll('.dropped-row').length === 1")
        press("s")
        wait("return document.querySelectorAll('table.steps tbody tr').length > 1")
        press("f")
        wait("return document.querySelector('.finding .excerpt') !== null")
        driver.find_element("css selector", ".finding button.link").click()
        # The row of the finding as tokens, with the words of the finding marked.
        assert VISIBLE in wait("return document.querySelector('.finding .tokens mark')?.textContent")
        press("c")
        wait("return document.querySelectorAll('.controls option').length === 3")
        for width in (1280, 390):
            resize(driver, width, 844)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        for place, ready in (("data", ".builds"), ("data/trained/data?tab=steps", "table.steps")):
            driver.get(f"{studio.origin}/#/{place}")
            wait(f"return document.querySelector('{ready}') !== null")
            assert driver.execute_script(TABLES_FIT), place
        assert driver.execute_script("return document.querySelectorAll('main img').length") == 0
        assert console(driver) == []


def test_what_is_no_build_is_refused(client: TestClient) -> None:
    assert "makes a ModelCheckpoint, not rows" in get(client, "/trained/model", 400)["error"]
    assert "has no stage 'other'" in get(client, "/one/other", 404)["error"]
    assert "no run 'three'" in get(client, "/three/data", 404)["error"]
    assert "has no row 30" in get(client, "/one/data/rows/train/30", 404)["error"]
    assert "no finished stage" in get(client, "/trained/data/rows/train/0", 404, model="../..")["error"]
    assert "is not the name of a run" in get(client, "/%2e%2e/data", 400)["error"]
