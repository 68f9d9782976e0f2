"""Time and memory of the studio's queries over a stage with a million stored rollouts.

    python -m benchmarks.studio_rollouts generate /tmp/rollouts_1m [--rows 1000000]
    python -m benchmarks.studio_rollouts measure /tmp/rollouts_1m [--rounds 5]
    python -m benchmarks.studio_rollouts pyarrow /tmp/rollouts_1m [--rounds 5]

``generate`` writes the files of a running stage with our own writer, and merges them as a finished stage does: 512
responses an update, to 64 of 8,192 prompts, of 60 to 340 tokens. ``measure`` times every view of the studio with JSON,
over the finished and the running stage: the first request of a process, and the median and the slowest of the next.
``pyarrow`` times the same pages without DuckDB, as far as pyarrow.dataset has them.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from align.store.rollout_writer import RolloutFiles, merge
from align.store.rollouts import ROLLOUTS, SCHEMA, open_rollouts, rollout_files
from align.studio.rollouts.details import RolloutDetails
from align.studio.rollouts.filters import RolloutFilter, TableQuery
from align.studio.rollouts.parquet_reader import ParquetReader
from align.studio.rollouts.queries import RolloutTable

DOCS = Path(__file__).parents[1] / "docs"
PROMPTS, GROUPS, SAMPLES = 8192, 64, 8
NUMBERS = ("sampler_logprobs", "logprobs", "ref_logprobs", "entropy", "values", "raw_advantages", "advantages")
RARE_WORDS = {"zyzzyva": 20, "quokka": 2000}
"""Words that no document has, and the number of a million responses with each."""


class Generator:
    """Makes the rows of one update after another, as a PPO run with 64 prompts of 8 samples stores them.

    Responses are words of the documentation, drawn with their frequencies: 60 to 340 tokens, 200 on average, each
    token a word or a sign. Numbers by token are normal variates, which hardly compress, as those of a real run.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows = rows
        texts = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))]
        counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
        self.words = pa.array([word if re.match(r"\W", word) else f" {word}" for word in counts])
        weights = np.array(list(counts.values()), float)
        self.edges = np.cumsum(weights / weights.sum())
        self.prompts = [self._prompt(number) for number in range(PROMPTS)]

    def _prompt(self, number: int) -> tuple[str, str, list[int]]:
        ids = self._ids(int(self.rng.integers(20, 80)))
        text = "".join(self.words.take(pa.array(ids)).to_pylist())
        return f"prompt-{number:05d}", json.dumps([{"role": "user", "content": text.strip()}]), ids.tolist()

    def _ids(self, count: int) -> Any:
        return np.searchsorted(self.edges, self.rng.random(count)).clip(max=len(self.edges) - 1).astype(np.int32)

    def update(self, number: int) -> pa.Table:
        """Return the rows of one update."""
        count = GROUPS * SAMPLES
        rng = self.rng
        places = np.repeat(rng.integers(0, PROMPTS, GROUPS), SAMPLES)
        lengths = np.clip(rng.normal(200, 60, count), 60, 340).astype(np.int32)
        ids = self._ids(int(lengths.sum()))
        texts = _by_row(lengths, self.words.take(pa.array(ids)), "token_texts")
        progress = number * count / self.rows
        math = (rng.random(count) < 0.2 + 0.5 * progress).astype(np.float32)
        style = rng.normal(progress, 0.4, count).astype(np.float32)
        reasons = rng.choice(["unequal", "no_answer", "timed_out"], count, p=[0.8, 0.17, 0.03])
        kl = _by_row(lengths, self._numbers(lengths, 0.01 + 0.05 * progress), "token_kl")
        columns: dict[str, Any] = {
            "update": np.full(count, number),
            "round": np.zeros(count, int),
            "index": np.arange(count),
            "group": np.repeat(np.arange(GROUPS), SAMPLES),
            "prompt_id": [self.prompts[place][0] for place in places],
            "prompt": [self.prompts[place][1] for place in places],
            "response": self._responses(texts),
            "score": math + style,
            "scores": [[("math", a), ("style", b)] for a, b in zip(math.tolist(), style.tolist(), strict=True)],
            "reasons": [[] if right else [("math", why)] for right, why in zip(math, reasons.tolist(), strict=True)],
            "tokens": lengths,
            "finished": lengths < 340,
            "learned": np.ones(count, bool),
            "kl": np.add.reduceat(kl.values.to_numpy(), np.cumsum(lengths) - lengths).astype(np.float32),
            "prompt_ids": [self.prompts[place][2] for place in places],
            "token_ids": _by_row(lengths, ids, "token_ids"),
            "token_texts": texts,
            "token_kl": kl,
            "weights_update": _by_row(lengths, np.full(len(ids), number - 1), "weights_update"),
        }
        for name in ("response_mask", "learn_mask"):
            columns[name] = _by_row(lengths, np.ones(len(ids), bool), name)
        for name in NUMBERS:
            columns[name] = _by_row(lengths, self._numbers(lengths, 1.0), name)
        arrays = []
        for field in SCHEMA:
            values = columns.get(field.name, [None] * count)
            arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
        return pa.Table.from_arrays(arrays, schema=SCHEMA)

    def _numbers(self, lengths: Any, scale: float) -> Any:
        return self.rng.standard_normal(int(lengths.sum()), dtype=np.float32) * np.float32(scale)

    def _responses(self, texts: pa.Array) -> pa.Array:
        responses = pc.binary_join(texts, "").to_pylist()
        for word, number in RARE_WORDS.items():
            for place in np.flatnonzero(self.rng.random(len(responses)) < number / 1_000_000):
                responses[place] += f" {word}"
        return pa.array(responses)


def _by_row(lengths: Any, values: Any, name: str) -> pa.Array:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    kind = SCHEMA.field(name).type
    elements = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(offsets, elements.cast(kind.value_type)).cast(kind)


def generate(root: Path, rows: int) -> None:
    """Write the files of a running stage, and those of the finished stage after it."""
    files = RolloutFiles(root / "running", 10**12, {"stage": "ppo", "keep": 1.0}, print)
    generator = Generator(rows)
    began = time.perf_counter()
    for number in range(1, rows // (GROUPS * SAMPLES) + 1):
        files.write(generator.update(number))
    print(f"wrote {time.perf_counter() - began:.0f} s", flush=True)
    merge(root / "running" / ROLLOUTS, root / "finished" / ROLLOUTS, print)
    print(f"merged {time.perf_counter() - began:.0f} s", flush=True)


# ---- the studio's queries


def studio_views(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the views of the studio by name."""
    table = RolloutTable(ParquetReader(folder), lambda: folder)
    details = RolloutDetails(table)
    last = table.page(TableQuery()).rows[0]

    def page(**query: Any) -> Callable[[], Any]:
        return lambda: asdict(table.page(TableQuery(**query)))

    def search(**query: Any) -> Callable[[], Any]:
        """Return a search that continues until it is complete, as the page does."""

        def run() -> Any:
            after = ""
            requests = []
            matches = 0
            while True:
                began = time.perf_counter()
                part = table.page(TableQuery(**query, after=after))
                requests.append(time.perf_counter() - began)
                matches += part.matches
                after = part.next
                if not after:
                    return {"requests": len(requests), "slowest": round(max(requests), 3), "matches": matches}

        return run

    middle = last["update"] // 2
    return {
        "newest rows": page(),
        "rows of one update": page(first_update=middle, last_update=middle),
        "page 2,001": page(offset=100_000),
        "highest KL": page(sort="kl"),
        "lowest part of the score": page(sort="part", sort_part="style", descending=False),
        "part of the score and length": page(part="style", min_score=1.0, max_tokens=150, sort="score"),
        "reason": page(reason="timed_out"),
        "words, frequent: first page": page(response_words="score reward"),
        "words, rare: first answer": page(response_words="zyzzyva"),
        "words, rare: complete": search(response_words="zyzzyva", sort="score"),
        "filters' choices": details.facets,
        "means by update": lambda: details.means(RolloutFilter(), ["math", "style"]),
        "means of a selection": lambda: details.means(RolloutFilter(reason="timed_out"), ["math", "style"]),
        "one prompt across updates": lambda: details.prompt(last["prompt_id"]),
        "one row with its tokens": lambda: details.row(f"{middle}--0-3-30"),
    }


def measure(root: Path, rounds: int) -> None:
    """Print the times of all views."""
    for name in ("finished", "running"):
        folder = root / name / ROLLOUTS
        files = rollout_files(folder)
        if not files:
            continue
        size = sum(path.stat().st_size for path in files) / 1e9
        print(f"{name}: {open_rollouts(folder).count_rows():,} rows in {len(files):,} files, {size:.1f} GB")
        print_times(studio_views(folder), rounds)
        print(f"largest memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def print_times(views: dict[str, Callable[[], Any]], rounds: int) -> None:
    """Print the first, the median and the slowest time of each view, its CPU time, and the size of its answer."""
    for name, view in views.items():
        times = []
        text = ""
        used = 0.0
        for _ in range(rounds + 1):
            began = time.perf_counter()
            used = time.process_time()
            answer = view()
            text = json.dumps(answer)
            times.append(1000 * (time.perf_counter() - began))
            used = 1000 * (time.process_time() - used)
        note = text if len(text) < 100 else f"{len(text) / 1000:.0f} kB"
        first, *others = times
        middle = statistics.median(others)
        walls = f"first {first:6.0f}   median {middle:6.0f}   slowest {max(others):6.0f}"
        print(f"  {name:<30} {walls}   CPU {used:6.0f} ms   {note}", flush=True)


# ---- the same with pyarrow


def pyarrow_views(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return pages of the table by pyarrow.dataset: sort keys of all rows, then the rows of the page."""
    shown = ["update", "index", "prompt_id", "prompt", "response", "score", "kl", "tokens"]

    def page(key: str, condition: Any = None) -> Callable[[], Any]:
        def run() -> Any:
            data = open_rollouts(folder)
            columns = list(dict.fromkeys([key, "update", "index"]))
            keys = data.to_table(columns=columns, filter=condition)
            best = keys.take(pc.select_k_unstable(keys, 50, [(key, "descending")])).to_pylist()
            places = [(row["update"], row["index"]) for row in best]
            is_near = ds.field("update").isin([update for update, _ in places])
            is_near &= ds.field("index").isin([index for _, index in places])
            rows = data.to_table(columns=shown, filter=is_near).to_pylist()
            return {"matches": len(keys), "rows": [row for row in rows if (row["update"], row["index"]) in places]}

        return run

    return {
        "newest rows": page("update"),
        "highest KL": page("kl"),
        "length": page("score", ds.field("tokens") <= 150),
        "words, rare: complete": page("score", pc.match_substring(ds.field("response"), "zyzzyva", ignore_case=True)),
    }


def main() -> None:
    """Generate the files, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["generate", "measure", "pyarrow"])
    parser.add_argument("root", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.action == "generate":
        generate(options.root, options.rows)
    elif options.action == "measure":
        measure(options.root, options.rounds)
    else:
        pa.set_cpu_count(2)
        print_times(pyarrow_views(options.root / "finished" / ROLLOUTS), options.rounds)


if __name__ == "__main__":
    main()
