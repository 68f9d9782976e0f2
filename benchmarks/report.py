"""The report of a long run: how long it takes to write, how large it is, how soon it is usable in Chromium.

    python -m benchmarks.report [--steps 10000] [--samples 2000] [--tokens 96] [--rounds 3] [--folder DIR]

The run is made up: six stages, of which four log ``--steps`` steps each (PPO with 40 metrics, the others with 10), and
an evaluation of four systems with ``--samples`` prompts, a response of ``--tokens`` tokens from each (with its KL by
token to the first 2,000 prompts), and four tasks. Writing is timed in a process of its own, without its imports, which
are timed apart; ``cpu`` is its processor time, which is comparable on a machine that others use too. A page is usable
when it is loaded and painted and has answered one word typed into the samples' filter; that is timed in the page
itself, from the start of the navigation. Without Chromium and chromedriver the page is only written.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from align.store.artifacts import Artifact, Kind

SYSTEMS = ["model", "sft", "dpo", "ppo"]
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]
STAGES: dict[str, tuple[Kind, tuple[str, ...], int]] = {
    "model": (Kind.MODEL, (), 0),
    "sft": (Kind.POLICY, ("model",), 10),
    "reward": (Kind.REWARD, ("sft",), 10),
    "dpo": (Kind.POLICY, ("sft",), 10),
    "ppo": (Kind.POLICY, ("sft", "reward"), 40),
    "evaluate": (Kind.SCORECARD, ("model", "sft", "dpo", "ppo"), 0),
}
"""Stage → what it makes, what it reads, how many metrics it logs a step."""
KL_PROMPTS = 2_000
"""Prompts whose responses have KL by token; an evaluation stores them for the first prompts only."""
Draws = dict[str, dict[str, list[float]]]
"""System → metric → a number for each prompt."""


def prepare(folder: Path, steps: int, samples: int, tokens: int) -> None:
    """Write the run's folders, with the record, events, scorecard and samples that its stages would leave."""
    rng = random.Random(0)
    for stage, (kind, inputs, metrics) in STAGES.items():
        path = folder / stage
        path.mkdir(parents=True)
        record = {
            "key": stage.encode().hex() * 8, "kind": stage, "stage": stage, "makes": str(kind), "version": 1,
            "seed": 17,
            "config": {f"field_{index}": index / 7 for index in range(40)}, "tokens": 1_000_000, "seconds": 3600.0,
            "input_stages": [{"stage": name, "kind": name, "key": name.encode().hex() * 8} for name in inputs],
            "metrics": {f"metric_{index}": rng.random() for index in range(30)}, "peak_memory_bytes": 9 * 2**30,
            "created": "2026-01-02T03:04:05+00:00", "packages": {"torch": "2.13"}, "platform": "linux",
            "command": "align run run.yaml",
        }  # fmt: skip
        (path / "record.json").write_text(json.dumps(record))
        with (path / "events.jsonl").open("w") as file:
            names = ["loss", "score", "gold", "kl", *(f"metric_{index}" for index in range(4, metrics))][:metrics]
            for step in range(1, steps + 1 if metrics else 0):
                values = {name: math.exp(-step / steps) + rng.gauss(0, 0.1) for name in names}
                file.write(json.dumps({"event": "metrics", "time": step / 7, "step": step, **values}) + "\n")
                file.write(json.dumps({"event": "progress", "time": step / 7, "done": step, "total": steps}) + "\n")
    draws: Draws = {}
    for name in SYSTEMS:
        draws[name] = {metric: [rng.random() for _ in range(samples)] for metric in ("gold", "reward", "length", "kl")}
        draws[name]["finished"] = [float(rng.random() < 0.9) for _ in range(samples)]
    (folder / "evaluate" / "scorecard.json").write_text(json.dumps(scorecard(rng, draws, samples)))
    lines = (folder / "evaluate" / "samples.jsonl").open("w")
    items = (folder / "evaluate" / "items.jsonl").open("w")
    with lines, items:
        for index in range(samples):
            line = sample(rng, draws, index, tokens)
            lines.write(json.dumps(line) + "\n")
            numbers = {name: {m: [column[index]] for m, column in draws[name].items()} for name in SYSTEMS}
            head = {name: line[name] for name in ("task", "id", "source")}
            items.write(json.dumps({**head, "values": numbers}) + "\n")


def sample(rng: random.Random, draws: Draws, index: int, tokens: int) -> dict[str, Any]:
    """A line of ``samples.jsonl``, with numbers by token if it is among the first."""
    responses = {}
    for name in SYSTEMS:
        words = [f"{rng.choice(WORDS)} " for _ in range(tokens)]
        numbers = {metric: draws[name][metric][index] for metric in ("gold", "reward", "kl")}
        response: dict[str, Any] = {
            "text": "".join(words),
            "tokens": tokens,
            "finished": bool(draws[name]["finished"][index]),
            **numbers,
        }
        if index < KL_PROMPTS:
            response["token_kl"] = [[word, rng.gauss(0, 0.3)] for word in words]
        responses[name] = [response]
    prompt = [{"role": "user", "content": " ".join(rng.choice(WORDS) for _ in range(40))}]
    return {"task": "prompts", "id": str(index), "source": f"source {index % 20}", "prompt": prompt,
            "responses": responses}  # fmt: skip


def scorecard(rng: random.Random, draws: Draws, prompts: int) -> dict[str, Any]:
    """A scorecard of the prompt set and four tasks, by the evaluation's own code."""
    from align.evaluation.answers import Item, Measured
    from align.evaluation.comparisons import Resampling
    from align.evaluation.scorecard import Metric, SystemInfo
    from align.evaluation.scorecard.scorecard_builder import Measurements, TaskResult, build
    from align.evaluation.tasks.base import Task

    class MadeUp(Task):
        def __init__(self, name: str) -> None:
            self.name = self.kind = self.title = name
            self.metrics = {
                f"metric_{index}": Metric(f"Metric {index}", "higher", "share", "made up") for index in range(4)
            }
            self.primary = "metric_0"
            self.items = [Item(f"{name}-{index}", f"source {index % 12}", []) for index in range(500)]

    def draw(count: int) -> list[list[float]]:
        return [[float(rng.random() < 0.5)] for _ in range(count)]

    tasks = [MadeUp(name) for name in ("ifeval", "gsm8k", "arc", "truthfulqa")]
    measurements = Measurements(
        [SystemInfo(name, name, "base" if name == "model" else "checkpoint", name) for name in SYSTEMS], "sft", "model",
        [f"source {index % 20}" for index in range(prompts)],
        {system: {name: [[x] for x in numbers] for name, numbers in draws[system].items()} for system in SYSTEMS},
        {"gold": ("higher", "made up")},
        tasks=[
            TaskResult(task, {s: Measured({name: draw(500) for name in task.metrics}) for s in SYSTEMS})
            for task in tasks
        ],
    )  # fmt: skip
    settings = {"prompts": prompts, "samples_per_prompt": 1, "sampling": {"max_tokens": 96, "temperature": 1.0},
                "engines": ["made up"], "seed": 0}  # fmt: skip
    return build(measurements, Resampling(200, 0), settings)


def write(folder: Path, out: Path) -> None:
    """Write the page and print how long it took; in a process of its own."""
    started = time.perf_counter()
    from align.report.run.run_report import write_report

    imported, cpu = time.perf_counter(), time.process_time()
    artifacts = [
        Artifact(stage, kind, folder / stage, json.loads((folder / stage / "record.json").read_text()))
        for stage, (kind, _, _) in STAGES.items()
    ]
    write_report(artifacts, None, out / "report.html")
    wall = time.perf_counter() - imported
    print(json.dumps({"imports": imported - started, "write": wall, "cpu": time.process_time() - cpu}))


def open_page(page: Path) -> dict[str, float] | None:
    """Return milliseconds until the page is parsed, loaded and has answered the filter; None without a browser."""
    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver_path):
        return None
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        driver.set_script_timeout(120)
        driver.get(page.as_uri())
        timings: dict[str, float] = driver.execute_async_script(
            """
            const done = arguments[0], twice = (then) => requestAnimationFrame(() => requestAnimationFrame(then));
            twice(() => {
              const entry = performance.getEntriesByType("navigation")[0];
              const paint = performance.getEntriesByName("first-contentful-paint")[0];
              const start = performance.now(), find = document.getElementById("find");
              find.value = "kast";
              find.dispatchEvent(new Event("input"));
              twice(() => done({ parsed: entry.domInteractive, loaded: entry.loadEventEnd,
                painted: paint ? paint.startTime : start, filter: performance.now() - start }));
            });
            """
        )
    finally:
        driver.quit()
    return timings | {"usable": max(timings["loaded"], timings["painted"]) + timings["filter"]}


def main() -> None:
    """Prepare, write and open ``--rounds`` times; print the median of each number and the slowest of the two totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--write", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(*options.write)
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="align-report-"))
    try:
        prepare(folder / "run", options.steps, options.samples, options.tokens)
        rounds = []
        for _ in range(options.rounds):
            (folder / "out").mkdir(exist_ok=True)
            command = [sys.executable, "-m", "benchmarks.report", "--write", str(folder / "run"), str(folder / "out")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds.append(json.loads(done.stdout) | (open_page(folder / "out" / "report.html") or {}))
        page = folder / "out" / "report.html"
        page_bytes = page.stat().st_size
        total_bytes = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
        print(f"page {page_bytes / 1e6:.1f} MB, files beside it {(total_bytes - page_bytes) / 1e6:.1f} MB")
        for name in rounds[0]:
            values = sorted(timings[name] for timings in rounds)
            unit = "s" if name in ("imports", "write", "cpu") else "ms"
            print(f"{name:8} {values[len(values) // 2]:8.1f} {unit} (slowest {values[-1]:.1f})")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
