"""Near-duplicate removal: align's step and datasketch on the same rows, in turn, each in a process of its own.

    python -m benchmarks.dedup [--rows 200000] [--rounds 1] [--threshold 0.7] [--only align]

Rows are random words with Zipf's frequencies, 20 to 250 of them, a prompt and a reply. Planted among them are copies
with a few words replaced, inserted or deleted, anywhere behind the row they copy, and look-alikes, which share 40 to
78 % of their words in one piece with another row (Jaccard 0.25 to 0.64) but are no duplicates. Both sides use 5-word
shingles, 128 permutations and the same bands. datasketch is used the fast way: signatures in bulk, one index, a row
dropped when the estimated similarity to a candidate reaches the threshold; align compares the shingles of close pairs.
Seconds are the processor's, of one thread: they include normalizing the text and, in deciding, reading rows back, and
exclude reading the file at first. Recall counts the planted copies whose exact Jaccard similarity reaches the
threshold, precision the dropped rows that are planted copies.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from align.config.recipe.step_settings import NearDuplicatesStep
from align.data.minhash import choose_bands
from align.data.rows import Row, assistant, normalized, take_rows, user, write_rows
from align.data.steps.step import StepContext, Table, start_step

SHINGLE, PERMUTATIONS, SHARD = 5, 128, 10_000
SIDES = ("align", "datasketch")
VOCABULARY = 30_000


def generate(folder: Path, rows: int, seed: int) -> None:
    """Write the rows as JSON lines, and ``truth.json``: of planted copies, how similar they are to what they copy."""
    numbers, rng = np.random.default_rng(seed), random.Random(seed)
    words = [f"{'bcdfghjklmnprstvwz'[n % 18]}{'aeiou'[n // 18 % 5]}{n:x}" for n in range(VOCABULARY)]
    planted: dict[int, float] = {}
    texts: list[list[str]] = []
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            kind = rng.random()
            if number > 100 and kind < 0.2:
                origin = rng.randrange(len(texts))
                change = edited if kind < 0.1 else look_alike
                text = change(texts[origin], words, rng)
                if change is edited:
                    planted[number] = exact_jaccard(texts[origin], text)
            else:
                draws = numbers.zipf(1.3, rng.randrange(20, 250)) % VOCABULARY
                text = [words[draw] for draw in draws]
            texts.append(text)
            cut = max(len(text) // 4, 1)
            file.write(json.dumps({"prompt": " ".join(text[:cut]), "reply": " ".join(text[cut:]).capitalize()}) + "\n")
    for number, records in enumerate(shards(folder)):
        write_rows(folder / f"{number:05d}.parquet", [as_row(record) for record in records])
    (folder / "truth.json").write_text(json.dumps(planted))


def edited(text: list[str], words: list[str], rng: random.Random) -> list[str]:
    """A copy with one to three words in a hundred changed."""
    copy = list(text)
    for _ in range(max(1, round(len(text) * rng.choice((0.005, 0.01, 0.02, 0.03))))):
        place, edit = rng.randrange(len(copy)), rng.randrange(3)  # 0 inserts, 1 deletes, 2 replaces
        copy[place : place + (edit != 0)] = [] if edit == 1 else [rng.choice(words)]
    return copy


def look_alike(text: list[str], words: list[str], rng: random.Random) -> list[str]:
    """Another text that shares its beginning with this one."""
    shared = round(len(text) * rng.uniform(0.4, 0.78))
    return text[:shared] + [rng.choice(words) for _ in range(len(text) - shared)]


def exact_jaccard(first: list[str], second: list[str]) -> float:
    """Return the Jaccard similarity of two texts' shingles, those of prompt and reply apart, as the row has them."""
    sets = []
    for text in (first, second):
        cut = max(len(text) // 4, 1)
        parts = (text[:cut], text[cut:])
        sets.append({tuple(p[start : start + SHINGLE]) for p in parts for start in range(max(len(p) - SHINGLE + 1, 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def shards(folder: Path) -> Iterator[list[dict[str, str]]]:
    """Records, so many at a time."""
    shard = []
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        for line in file:
            shard.append(json.loads(line))
            if len(shard) == SHARD:
                yield shard
                shard = []
    if shard:
        yield shard


def as_row(record: dict[str, str]) -> Row:
    """A record as a row of a build."""
    prompt, completion = [user(record["prompt"])], [assistant(record["reply"])]
    return {"id": "", "source": "rows", "prompt": prompt, "checks": "", "completion": completion}


def read_back(folder: Path, places: np.ndarray) -> Iterator[Row]:
    """Rows by number, from Parquet shard by shard, as a build does."""
    for shard in np.unique(places // SHARD):
        yield from take_rows(folder / f"{shard:05d}.parquet", places[places // SHARD == shard] % SHARD)


def run_align(folder: Path, threshold: float) -> dict[str, Any]:
    """The step as a build runs it: sketches shard by shard, then one verdict."""
    config = NearDuplicatesStep(type="near_duplicates", threshold=threshold, permutations=PERMUTATIONS, shingle=SHINGLE)
    step = start_step(config, StepContext(kind="instructions", seed=0, base=folder, work=folder))
    sketches, sketching = [], 0.0
    for records in shards(folder):
        rows = [as_row(record) for record in records]
        begin = time.process_time()
        sketches.append(step.sketch(rows))
        sketching += time.process_time() - begin
    begin = time.process_time()
    columns = {name: np.concatenate([sketch.pop(name) for sketch in sketches]) for name in list(sketches[0])}
    count = len(columns["whole"])
    table = Table(
        columns,
        np.ones(count, dtype=bool),
        np.zeros(count, dtype=np.int32),
        ["rows"],
        lambda _: {},
        partial(read_back, folder),
    )
    verdict = step.decide(table)
    deciding = time.process_time() - begin
    return {
        "rows": count,
        "sketching": sketching,
        "deciding": deciding,
        "dropped": np.flatnonzero(verdict.code >= 0).tolist(),
        "notes": verdict.notes,
    }


def run_datasketch(folder: Path, threshold: float) -> dict[str, Any]:
    """Do the same work with datasketch's signatures and index."""
    from datasketch import MinHash, MinHashLSH

    bands = choose_bands(threshold, PERMUTATIONS)
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(bands.count, bands.rows))
    signatures: list[Any] = []
    dropped, sketching, deciding = [], 0.0, 0.0
    for records in shards(folder):
        begin = time.process_time()
        batch = MinHash.bulk([_byte_shingles(record) for record in records], num_perm=PERMUTATIONS)
        middle = time.process_time()
        for signature in batch:
            number = len(signatures)
            signatures.append(signature)
            if any(signature.jaccard(signatures[other]) >= threshold for other in index.query(signature)):
                dropped.append(number)
            index.insert(number, signature, check_duplication=False)
        sketching += middle - begin
        deciding += time.process_time() - middle
    return {"rows": len(signatures), "sketching": sketching, "deciding": deciding, "dropped": dropped}


def _byte_shingles(record: dict[str, str]) -> list[bytes]:
    shingles = []
    for part in (record["prompt"], record["reply"]):
        words = normalized(part).split()
        starts = range(max(len(words) - SHINGLE + 1, 1))
        shingles += [" ".join(words[start : start + SHINGLE]).encode() for start in starts]
    return shingles


def judge(folder: Path, threshold: float, dropped: list[int]) -> dict[str, float]:
    """Return recall and precision of the dropped rows against the planted copies."""
    planted = {int(number): value for number, value in json.loads((folder / "truth.json").read_text()).items()}
    gone = set(dropped)
    wanted = {number for number, similarity in planted.items() if similarity >= threshold}
    scores: dict[str, float] = {"planted": len(wanted), "dropped": len(gone)}
    scores["recall"] = len(gone & wanted) / max(len(wanted), 1)
    scores["precision"] = len(gone & set(planted)) / max(len(gone), 1)
    for low, high in ((0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        bucket = {number for number, similarity in planted.items() if low <= similarity < high}
        scores[f"recall {low:g} to {min(high, 1):g}"] = len(gone & bucket) / max(len(bucket), 1)
    return scores


def measure(side: str, folder: Path, threshold: float) -> None:
    """Run one side in this process, and print its measurements as JSON."""
    results = (run_align if side == "align" else run_datasketch)(folder, threshold)
    results |= judge(folder, threshold, results.pop("dropped"))
    results["rows/s"] = results["rows"] / (results["sketching"] + results["deciding"])
    results["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(results))


def main() -> None:
    """Generate rows, run the sides in turn, and print a line each and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threshold", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]), options.threshold)
        return
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name), options.rows, options.seed)
        rates: dict[str, list[float]] = {}
        for side in [options.only] if options.only else list(SIDES) * options.rounds:
            command = [sys.executable, "-m", "benchmarks.dedup", "--measure", side, name]
            command += ["--threshold", str(options.threshold)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            results = json.loads(run.stdout)
            rates.setdefault(side, []).append(results["rows/s"])
            print(f"{side:11}", "  ".join(f"{key} {_short(value)}" for key, value in results.items() if key != "notes"))
            if "notes" in results:
                print(f"{'':11}", results["notes"])
    if len(rates) == len(SIDES):
        print(f"align / datasketch: {max(rates['align']) / max(rates['datasketch']):.1f} times the rows a second")


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    main()
