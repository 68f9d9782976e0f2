"""Seconds of a training stage's look at its rows, beside the encoding that it does anyway.

    python -m benchmarks.lint --rows 10000 --files path/to/dolly_3k.json

Rows are those of ``--files`` (alpaca's format), repeated, or the embedded generator's; each number is the median of
``--repeats`` runs, in the processor's seconds of one thread. Leaves out loading the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def rows_of(count: int, file: str | None) -> list[dict[str, Any]]:
    """Return ``count`` instruction rows with ids of their own."""
    from align.config.recipe.source_settings import EMBEDDED_MAX_ROWS
    from align.data.families.embedded import generate
    from align.data.rows import assistant, user

    if file is None:
        rows = generate(min(count, EMBEDDED_MAX_ROWS), seed=0)
    else:
        records = json.loads(Path(file).read_text(encoding="utf-8"))
        texts = [(f"{r['instruction']}\n\n{r.get('input', '')}".strip(), r["output"].strip()) for r in records]
        rows = [{"prompt": [user(prompt)], "completion": [assistant(answer)]} for prompt, answer in texts if answer]
    times = -(-count // len(rows))
    return [{**row, "id": f"{n}"} for n, row in enumerate((rows * times)[:count])]


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--files", help="a JSON list of alpaca's records")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    from align.lint.encodings import encoding_of
    from align.lint.linter import Linter, Options
    from align.lint.trainer import load_tokenizer_and_limits
    from align.training.rows import encode_supervised

    tokenizer, limits, ends = load_tokenizer_and_limits(options.model, Path("."), options.max_length)
    rows = rows_of(options.rows, options.files)
    collator = encoding_of("sft").default_collator(tokenizer)
    encoding, linting, tokens, names = [], [], 0, []
    for _ in range(options.repeats):
        start = time.process_time()
        encoded = encode_supervised(tokenizer, rows, options.max_length)
        encoding.append(time.process_time() - start)
        positions = {id(row): number for number, row in enumerate(encoded.sources)}
        encoded_rows = [encoded.rows[positions[id(row)]] if id(row) in positions else None for row in rows]
        start = time.process_time()
        linter = Linter(tokenizer, Options("sft", limits=limits, ends=ends))
        linter.look("train", rows, collator, encoded_rows.__getitem__)
        names = [finding.name for finding in linter.result()]
        linting.append(time.process_time() - start)
        tokens = sum(encoded.lengths)
    print(json.dumps({
        "rows": len(rows), "tokens": tokens, "findings": names,
        "encoding_seconds": round(statistics.median(encoding), 2), "lint_seconds": round(statistics.median(linting), 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
