"""What a user does with the studio, from an empty store to a reward model of the user's own answers.

One test with a real pipeline, a real studio and a real browser. Its screenshots are in the test's folder ``pictures``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.store.annotations import AnnotationSet
from align.store.store import Store
from tests.support.report.browser import chromium, console, needs_browser, resize
from tests.support.studio.server import RunningStudio, running_studio
from tests.support.studio.visit import ENTER, HOME, RIGHT, Visit

pytestmark = [needs_browser, pytest.mark.slow, pytest.mark.timeout(3600)]
REPOSITORY = Path(__file__).parents[2]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202egpj"
VISIBLE = HOSTILE.replace("\u202e", "\\u202e")
PAIRS = 20
RUN_SECONDS = 2400.0
PROMPT = "(document.querySelector('.question .prompt .text') || {textContent: ''}).textContent"
SAVED = "document.getElementById('saved').textContent === 'saved ✓'"


def test_from_an_empty_store_to_a_reward_model(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store").root
    pictures = tmp_path / "pictures"
    with chromium() as driver, chromium() as other:
        with running_studio(store) as studio:
            visit = Visit(driver, studio, pictures)
            watch_the_run(visit, store, write_smoke(tmp_path))
            follow_a_prompt(visit)
            explain_a_point_of_the_curve(visit)
            chat_with_two_checkpoints(visit)
            check_refusals(studio, store)
            make_the_set(visit)
            port = studio.origin.rpartition(":")[2]
            prompts = annotate_half(visit, Visit(other, studio, pictures), store)
            studio.process.kill()
            studio.process.wait()
            prompts.append(answer(visit, "2"))
            visit.wait("document.getElementById('saved').textContent === '1 not saved yet'")
            assert saved(store, "ann") == prompts[:-1]
        assert any("ERR_CONNECTION_REFUSED" in line for line in console(driver))
        with running_studio(store, "--port", port) as studio:
            visit = Visit(driver, studio, pictures)
            annotate_the_rest(visit, Visit(other, studio, pictures), store, prompts)
            train_on_the_set(visit, store, tmp_path)


# ---- the run ----


def write_smoke(folder: Path) -> Path:
    """Write the smoke pipeline for a store elsewhere; PPO has four prompts, so every update answers them."""
    raw = yaml.safe_load((REPOSITORY / "pipelines" / "smoke.yaml").read_text(encoding="utf-8"))
    recipe = str(REPOSITORY / "data_recipes" / "embedded.yaml")
    stages = {"few": {"stage": "data", "recipe": recipe, "max_rows": 5}} | raw["stages"]
    stages["data"]["recipe"] = recipe
    stages["ppo"]["prompts"] = "few"
    path = folder / "smoke.yaml"
    path.write_text(yaml.safe_dump(raw | {"stages": stages}, sort_keys=False), encoding="utf-8")
    return path


def start_run(pipeline: Path, store: Path) -> subprocess.Popen[bytes]:
    """Start ``align run`` as a user does; its output is next to the pipeline."""
    words = [sys.executable, "-m", "align.cli.main", "run", str(pipeline), "--store", str(store)]
    with pipeline.with_suffix(".out").open("wb") as output:
        return subprocess.Popen(words, cwd=REPOSITORY, env=dict(os.environ), stdout=output, stderr=subprocess.STDOUT)


def watch_the_run(visit: Visit, store: Path, pipeline: Path) -> None:
    """Start the pipeline and see it begin, work and finish in the list of runs, which is never loaded again."""
    visit.open("#/runs", "table.runs")
    visit.wait("document.querySelector('main').textContent.includes('This store has no runs yet')")
    visit.capture("runs_empty")
    visit.driver.execute_script("window.isSamePage = true")
    process = start_run(pipeline, store)
    try:
        visit.wait("document.querySelector('tr[data-run=smoke] .state.s-runs') !== null", 600)
        visit.capture("runs_running")
        finished = "document.querySelector('tr[data-run=smoke] .state:is(.s-done, .s-failed, .s-stopped)') !== null"
        visit.wait(finished, RUN_SECONDS)
        assert process.wait(300) == 0, pipeline.with_suffix(".out").read_text(errors="replace")[-3000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    visit.wait("document.querySelector('tr[data-run=smoke] .state.s-done') !== null")
    assert "10 of 10 stages" in visit.texts("tr[data-run=smoke]")[0]
    assert visit.driver.execute_script("return window.isSamePage") is True
    visit.press("j", ENTER)
    visit.wait("document.querySelectorAll('.diagram .box.done').length === 10")
    visit.capture("run")


# ---- rollouts ----


def follow_a_prompt(visit: Visit) -> None:
    """Go from a rollout of the first update to the answers of all updates to its prompt."""
    visit.open("#/rollouts", ".panel table a")
    assert "ppo" in visit.texts(".panel table a")
    visit.open("#/rollouts/smoke/ppo?update=1", ".rollouts tbody tr")
    visit.capture("rollouts")
    visit.press("j", "j", ENTER)
    visit.wait("document.querySelector('.tok') !== null")
    visit.capture("rollout")
    prompt = visit.texts(".row-page .turn .text")[0]
    visit.press("p")
    visit.wait("document.querySelectorAll('.across .column').length >= 2")
    assert visit.texts(".turn .text")[0] == prompt
    headings = visit.texts(".across .column h3 a")
    assert headings[0] == "Update 1"
    assert len(set(headings)) == len(headings) >= 2
    assert visit.texts(".across .column:nth-child(2) :is(ins, del)"), "answers of random sampling differ"
    visit.capture("prompt")


def explain_a_point_of_the_curve(visit: Visit) -> None:
    """Go from a point of the score's curve to the rows of its update, and from a row to the parts of its score."""
    visit.open("#/rollouts/smoke/ppo", ".mean-curve")
    curve = visit.driver.find_element("css selector", ".mean-curve")
    visit.driver.execute_script("arguments[0].focus()", curve)
    visit.press(HOME, RIGHT, ENTER)
    visit.wait("location.hash.includes('first_update=2&last_update=2')")
    updates = "[...document.querySelectorAll('.rollouts tbody tr td:first-child')].map((cell) => cell.textContent)"
    visit.wait(f"new Set({updates}).size === 1 && {updates}[0] === '2'")
    rows = len(visit.texts(".rollouts tbody tr"))
    assert rows == 16
    visit.press("j", ENTER)
    visit.wait("document.querySelector('.score-number') !== null")
    visit.wait("location.hash.includes('row?id=2-')")
    float(visit.texts(".score-number")[0].replace("−", "-"))
    visit.capture("score")


# ---- chat ----


def chat_with_two_checkpoints(visit: Visit) -> None:
    """Ask two checkpoints a hostile question, and see both answers with the score of the reward model."""
    visit.open("#/chat?models=smoke:sft,smoke:ppo", "#message")
    visit.driver.execute_script("""
      const reward = document.getElementById("reward");
      reward.value = "smoke:reward";
      reward.dispatchEvent(new Event("change"));
      const tokens = document.querySelector(".chat-setup [name=max_tokens]");
      tokens.value = "16";
      tokens.dispatchEvent(new Event("input", { bubbles: true }));
      document.getElementById("message").focus();
    """)
    visit.driver.find_element("css selector", "#message").send_keys(
        "Say hello. <script>document.title='owned'</script>", ENTER
    )
    visit.wait("document.querySelectorAll('.reply[aria-busy=false] .numbers:not(:empty)').length === 2", 600)
    visit.wait("document.querySelectorAll('.reward-score b').length === 2", 600)
    assert visit.texts(".model-name") == ["smoke:sft", "smoke:ppo"]
    check_hostile_text(visit, "<script>document.title='owned'</script>", ".said.user .text")
    visit.capture("chat")


def check_hostile_text(visit: Visit, text: str, selector: str) -> None:
    """Check that the page shows markup as text, and that none of it ran."""
    assert any(text in shown for shown in visit.texts(selector))
    assert visit.driver.execute_script("return document.querySelectorAll('main img, main script').length") == 0
    assert "owned" not in visit.driver.title


# ---- refusals ----


def check_refusals(studio: RunningStudio, store: Path) -> None:
    """Check that a missing token, a foreign origin or host, and a path out of the store are refused."""
    (store.parent / "secret.html").write_text("a secret", encoding="utf-8")
    with studio.client() as client:
        token = client.headers.pop("authorization")
        assert client.get("/api/runs").status_code == 401
        assert client.get("/api/runs", headers={"authorization": "Bearer wrong"}).status_code == 401
        client.headers["authorization"] = token
        assert client.get("/api/runs").status_code == 200
        for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}, {"sec-fetch-site": "cross-site"}):
            assert client.get("/api/runs", headers=headers).status_code == 403, headers
            assert client.post("/api/annotate/own/pairs", headers=headers, json={}).status_code == 403, headers
        for path in (
            "/reports/smoke/..%2f..%2f..%2fsecret.html",
            "/reports/..%2f..%2fsecret.html",
            "/static/..%2fapp.py",
        ):
            refused = client.get(path)
            assert refused.status_code in (400, 404), path
            assert "a secret" not in refused.text
        added = client.post("/api/annotate/..%2f..%2foutside/pairs", json={"lines": "{}"})
        assert added.status_code in (400, 404, 405, 422)
    assert {path.name for path in store.parent.iterdir() if path.is_dir()} == {"store", "pictures"}


# ---- annotation ----


def make_the_set(visit: Visit) -> None:
    """Make the set ``own`` with the form, of twenty pairs of the run's samples, and a set with a hostile answer."""
    visit.open("#/annotate", "form [name=set]")
    form = visit.driver.find_element("css selector", "form")
    form.find_element("css selector", "[name=set]").send_keys("own")
    choice = json.dumps(["smoke", "sample"])
    form.find_element("xpath", f".//option[@value='{choice.replace(', ', ',')}']").click()
    form.find_element("css selector", "button").click()
    visit.wait("location.hash === '#/annotate/own'")
    hostile = {"prompt": HOSTILE, "a": HOSTILE, "b": "harmless", "systems": ["new", "old"]}
    with visit.studio.client() as client:
        settings = {"overlap": 1.0, "duplicates": 0.0, "order": "random"}
        client.post("/api/annotate/own/settings", json=settings).raise_for_status()
        client.post("/api/annotate/hostile/pairs", json={"lines": json.dumps(hostile)}).raise_for_status()
    open_questions(visit, "ann", "hostile")
    check_hostile_text(visit, VISIBLE, ".question .prompt .text")
    check_hostile_text(visit, VISIBLE, ".answer .text")
    visit.capture("hostile")


def open_questions(visit: Visit, annotator: str, name: str = "own") -> None:
    visit.open(f"#/annotate/{name}/questions?name={annotator}", ".sides")


def answer(visit: Visit, key: str) -> str:
    """Press a verdict's key, wait until the pair is gone, and return its prompt."""
    before = str(visit.wait(PROMPT))
    visit.press(key)
    visit.wait(f"{PROMPT} !== {json.dumps(before)}")
    return before


def saved(store: Path, annotator: str) -> list[str]:
    """Return the prompts that an annotator has answered, in order."""
    annotations = AnnotationSet(store, "own")
    pairs = annotations.pairs()
    answers = [each for each in annotations.answers() if each.annotator == annotator]
    return [pairs[each.pair].prompt[-1]["content"] for each in answers]


def annotate_half(visit: Visit, other: Visit, store: Path) -> list[str]:
    """Answer nine pairs by keys while a second annotator answers six in another browser; return ann's prompts."""
    open_questions(visit, "ann")
    open_questions(other, "bob")
    visit.capture("question")
    prompts: list[str] = []
    # The second annotator works at the same time, in a thread with its own browser.
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for key in "125412":
                answer(other, key)
            other.wait(SAVED)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    prompts += [answer(visit, key) for key in "124512452"]
    thread.join()
    assert errors == []
    visit.wait(SAVED)
    assert saved(store, "ann") == prompts
    assert len(saved(store, "bob")) == 6
    return prompts


def annotate_the_rest(visit: Visit, other: Visit, store: Path, prompts: list[str]) -> None:
    """Continue after the kill until twenty pairs are answered; the journal has every answer once and in order."""
    open_questions(visit, "ann")
    visit.wait(SAVED)
    assert saved(store, "ann") == prompts
    open_questions(other, "bob")
    for number in range(PAIRS - len(prompts)):
        prompts.append(answer(visit, "12453"[number % 5]))
    answer(other, "1")
    for each in (visit, other):
        each.wait(SAVED)
    assert saved(store, "ann") == prompts
    assert len(prompts) == len(set(prompts)) == PAIRS
    assert len(saved(store, "bob")) == 7
    visit.press("q")
    visit.wait("document.querySelector('.panel dl.facts') !== null")
    assert {"ann", "bob"} <= set(visit.texts("tbody th"))
    console(visit.driver)
    visit.capture("annotate_report")


# ---- a reward model of the set ----


def train_on_the_set(visit: Visit, store: Path, folder: Path) -> None:
    """Build a recipe from the set, train a reward model on it, and see the run and its rows in the studio."""
    (folder / "own.yaml").write_text(
        "description: Answers of this test.\nkind: preferences\nsources: [{type: annotations, set: own}]\n"
        "test_size: 0.2\n"
    )
    training = {"learning_rate": 1e-3, "max_steps": 4, "batch_size": 4, "max_length": 512}
    stages: dict[str, Any] = {
        "model": {"source": "tiny"},
        "data": {"recipe": "own.yaml"},
        "reward": {"model": "model", "data": "data", "lint": {"waive": ["not-utf8"]}, **training},
    }
    pipeline = folder / "helpful.yaml"
    pipeline.write_text(yaml.safe_dump({"name": "helpful", "seed": 7, "stages": stages}, sort_keys=False))
    visit.open("#/runs", "tr[data-run=smoke]")
    process = start_run(pipeline, store)
    try:
        assert process.wait(900) == 0, pipeline.with_suffix(".out").read_text(errors="replace")[-3000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    visit.wait("document.querySelector('tr[data-run=helpful] .state.s-done') !== null")
    stage = Store.open(store).runs()["helpful"]["stages"]
    rows = [
        json.loads(line)
        for path in sorted(Store.open(store).folder("data", stage["data"]["key"]).rglob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert rows
    reward = Store.open(store).folder("reward", stage["reward"]["key"])
    assert list(reward.rglob("*.safetensors"))
    visit.open("#/data", "main a")
    assert any("helpful" in text for text in visit.texts("main"))
    visit.capture("data")
    resize(visit.driver, 1280, 900)
