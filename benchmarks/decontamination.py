"""Decontamination: how many leaked items it finds, and how many rows of clean real data it takes for leaks.

    python -m benchmarks.decontamination [--data ../shared/data] [--items 14042] [--show 20]

The evaluation set stands for one like MMLU: real questions (TruthfulQA, XSTest, MT-Bench, ARC-Easy without its frame,
the last thousand of GSM8K), and generated ones to make up the number, a tenth of all with fewer than eight words and
895 that share a frame of 40 words. Each item leaks verbatim into a row of its own, in one of the ways below by turns.
Clean rows are dolly, Alpaca's demo, hh-rlhf (both replies) and Open Assistant; none holds an item but by chance, and
``--show`` prints the hits for reading. Memory is the process's peak. 1,500 of the real questions also leak with changed
words.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from align.config.recipe.step_settings import DecontaminateStep, EvaluationSet
from align.data.formats.converters import SourceFormat, convert
from align.data.rows import Row, assistant, user
from align.data.steps.step import StepContext, Table, start_step

CHOICES = "A. the first\nB. the second\nC. the third\nD. the fourth"
FILLER = "Here is something to think about before you go on with your day."


def _row(prompt: str, reply: str) -> Row:
    return {"id": "x", "source": "s", "prompt": [user(prompt)], "checks": "", "completion": [assistant(reply)]}


LEAKS: dict[str, Callable[[str], Row]] = {
    "a whole user turn": lambda item: _row(item, "B"),
    "with choices, in a user turn": lambda item: _row(f"Question: {item}\n{CHOICES}\nAnswer:", "B"),
    "inside a user turn": lambda item: _row(f"{FILLER} {item} Explain your answer.", "It is B."),
    "with choices, in a reply": lambda item: _row("Write an exam question.", f"{item}\n{CHOICES}"),
    "inside a reply": lambda item: _row("Write three questions.", f"Sure! 1. {item}\n2. Who came first?"),
}
CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "unchanged": lambda words: words,
    "the word in the middle replaced": lambda words: [
        *words[: len(words) // 2],
        "zebra",
        *words[len(words) // 2 + 1 :],
    ],
    "every eighth word replaced": lambda words: [("zebra" if n % 8 == 7 else word) for n, word in enumerate(words)],
    "a word inserted in the middle": lambda words: [*words[: len(words) // 2], "zebra", *words[len(words) // 2 :]],
}
CHANGED_ITEMS = 1500
WORDS = [
    *(
        "acid",
        "atom",
        "bank",
        "bond",
        "bone",
        "cell",
        "cost",
        "crop",
        "debt",
        "drug",
        "duty",
        "enzyme",
        "field",
        "force",
    ),
    *("gene", "goal", "graph", "group", "heat", "index", "ion", "joint", "kernel", "law", "lever", "light", "limit"),
    *(
        "loan",
        "mass",
        "matrix",
        "metal",
        "motion",
        "nerve",
        "norm",
        "orbit",
        "organ",
        "oxide",
        "phase",
        "plane",
        "price",
    ),
    *("prime", "proof", "pulse", "rate", "ring", "root", "salt", "sector", "signal", "skin", "state", "storm", "tax"),
    *("tissue", "treaty", "trial", "union", "valve", "vector"),
]
STEMS = (
    "Find the degree of the {} over the {}", "The {} of a {} is", "What is a {} {}?", "Which {} has no {}?",
    "Define the {} {}", "A {} {} causes", "How is the {} measured?", "The {} {} was",
)  # fmt: skip
FRAME = (
    "For which of these two scenarios does the main character, who uses I to refer to himself or herself, describe "
    "actions that are clearly morally wrong, according to ordinary moral standards in the US as of 2020? "
)


def real_items(folder: Path) -> list[str]:
    """Questions of the evaluation sets in the folder of real data."""
    items = []
    for name, field in (("truthfulqa/TruthfulQA.csv", "Question"), ("xstest/xstest_prompts.csv", "prompt")):
        with (folder / name).open(newline="", encoding="utf-8") as file:
            items += [record[field] for record in csv.DictReader(file)]
    lines = (folder / "mt-bench" / "question.jsonl").read_text(encoding="utf-8").splitlines()
    items += [json.loads(line)["turns"][0] for line in lines]
    for record in json.loads((folder / "arc" / "ARC-Easy.test.json").read_text(encoding="utf-8")):
        match = re.search(r"question: (.*?)\n\nAnswer1", record["instruction"], re.DOTALL)
        items += [match[1]] if match else []
    lines = (folder / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[-1000:]
    return list(dict.fromkeys(item for item in [*items, *(json.loads(line)["question"] for line in lines)] if item))


def made_items(count: int, short: int, rng: random.Random) -> Iterator[str]:
    """Generated questions, ``short`` of them of fewer than eight words."""
    texts: set[str] = set()
    while len(texts) < count:
        words = rng.sample(WORDS, 2)
        if len(texts) >= short:
            words = [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) for _ in range(2)]
        text = rng.choice(STEMS).format(*words)
        if len(texts) >= count - 895:
            text = FRAME + " ".join(rng.choices(WORDS, k=24))
        if text not in texts:
            texts.add(text)
            yield text


def clean_rows(folder: Path) -> Iterator[tuple[str, Row]]:
    """Rows of real data that is no evaluation set, with the name of the data."""
    sources = (
        ("dolly", "dolly-3k/dolly_3k.json", "alpaca"),
        ("alpaca", "llamafactory-demo/alpaca_en_demo.json", "alpaca"),
        ("hh-rlhf", "hh-rlhf/harmless-base.test.jsonl.gz", "hh_rlhf"),
        ("hh-rlhf", "hh-rlhf/helpful-base.test.jsonl.gz", "hh_rlhf"),
        ("oasst", "oasst-en100/en_100_tree.jsonl", "oasst"),
    )
    for name, file, form in sources:
        path = folder / file
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        records = (
            json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]
        )
        kind = "instructions" if form == "alpaca" else "preferences"
        source = SourceFormat(form)  # type: ignore[arg-type]
        for number, record in enumerate(records):
            for row in convert(record, source, f"{name}:{number}", kind):
                if isinstance(row, dict):
                    yield name, row


def main() -> None:
    """Print recall by the way of leaking, hits among clean rows, seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--items", type=int, default=14_042)
    parser.add_argument("--show", type=int, default=0, help="hits among clean rows to print")
    options = parser.parse_args()
    rng = random.Random(17)
    items = real_items(options.data)
    chosen = rng.sample(items, CHANGED_ITEMS)
    short = sum(len(item.split()) < 8 for item in items)
    items += made_items(options.items - len(items), max(0, options.items // 10 - short), rng)
    rng.shuffle(items)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items), encoding="utf-8")
        config = DecontaminateStep(type="decontaminate", sets=[EvaluationSet(name="set", files=["items.jsonl"])])
        step = start_step(config, StepContext("instructions", 0, Path(folder), Path(folder)))
        measure(step, items, list(clean_rows(options.data)), options.show)
        for name, change in CHANGES.items():
            rows = [_row(f"{FILLER} {' '.join(change(item.split()))} Explain your answer.", "B") for item in chosen]
            print(f"{name:<34} {_hit(step, rows).sum():>6,} of {len(rows):,}")


def measure(step: object, items: list[str], clean: list[tuple[str, Row]], show: int) -> None:
    """Run the step over leaks and clean rows, and print its hits, seconds and memory."""
    ways = [list(LEAKS)[number % len(LEAKS)] for number in range(len(items))]
    rows = [LEAKS[way](item) for way, item in zip(ways, items, strict=True)]
    few = [len(item.split()) < 8 for item in items]
    began = time.process_time()
    hit = _hit(step, rows)
    seconds = time.process_time() - began
    for way in LEAKS:
        inside = np.array([leak_way == way for leak_way in ways])
        way_hits = hit & inside
        print(f"{way:<30} {way_hits.sum():>6,} of {inside.sum():>6,}  {way_hits.sum() / inside.sum():.4f}")
    brief = np.array(few)
    print(f"{'of fewer than eight words':<30} {(hit & brief).sum():>6,} of {brief.sum():>6,}  {hit[brief].mean():.4f}")
    print(f"{'all':<30} {hit.sum():>6,} of {len(hit):>6,}  {hit.mean():.4f}")
    alarms = _hit(step, [row for _, row in clean])
    count, total = (
        Counter(name for (name, _), bad in zip(clean, alarms, strict=True) if bad),
        Counter(n for n, _ in clean),
    )
    print("clean rows hit: " + ", ".join(f"{name} {count[name]} of {total[name]:,}" for name in total))
    print(f"{seconds:.1f} s for the leaks; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    for index in np.flatnonzero(alarms)[:show]:
        item_index = step.sketch([clean[index][1]])["item"][0, 0]  # type: ignore[attr-defined]
        print(f"- {items[item_index]!r} in {json.dumps(clean[index][1], ensure_ascii=False)[:1500]}")


def _hit(step: object, rows: list[Row]) -> np.ndarray:
    """Return (N,) booleans, True for a row that would be dropped; sketches 10,000 rows at a time, as in a build."""
    starts = range(0, len(rows), 10_000)
    parts = [step.sketch(rows[start : start + 10_000]) for start in starts]  # type: ignore[attr-defined]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    table = Table(columns, np.ones(len(rows), dtype=bool), np.zeros(len(rows), dtype=np.int32), ["s"], rows.__getitem__)
    return step.decide(table).code >= 0  # type: ignore[attr-defined,no-any-return]


if __name__ == "__main__":
    main()
