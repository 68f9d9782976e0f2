"""A small build written by hand, in the form that the builder writes, with some hostile texts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.builds.shards import DROPPED
from align.data.rows import Row, assistant, row_id, user, write_rows

HOSTILE = (
    '<script>document.title="PWNED"</script><img src=x onerror="document.title=\'PWNED\'">'
    "</pre></textarea><!-- {{ 7*7 }} {% raw %} | `x` [a](javascript:alert(1)) \x1b[31mred \u202egnp.exe \x00"
)


def row(prompt: str, answer: str, source: str = "first", **more: Any) -> Row:
    """Return an instruction."""
    fields: Row = {"source": source, "prompt": [user(prompt)], "checks": "", "completion": [assistant(answer)], **more}
    return {"id": row_id(fields), **fields}


def pair(prompt: str, chosen: str, rejected: str, source: str = "first") -> Row:
    """Return a preference."""
    fields: Row = {"source": source, "prompt": [user(prompt)], "checks": "", "chosen": [assistant(chosen)]}
    fields["rejected"] = [assistant(rejected)]
    return {"id": row_id(fields), **fields}


def write_split(folder: Path, split: str, rows: list[Row], files: int = 1) -> None:
    """Write a split in ``files`` shards."""
    size = -(-len(rows) // files)
    for number in range(files):
        name = f"{split}-{number:05d}-of-{files:05d}.parquet"
        write_rows(folder / name, rows[number * size : (number + 1) * size])


def write_build(
    folder: Path,
    train: list[Row],
    test: list[Row],
    dropped: list[tuple[Row, str, dict[str, Any]]] = (),  # type: ignore[assignment]
    licenses: dict[str, str | None] | None = None,
    files: int = 1,
) -> Path:
    """Write rows, dropped rows (row, reason, detail) of a step called dedup, and a ledger that adds up."""
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder, "train", train, files)
    write_split(folder, "test", test)
    lines = [
        {
            "where": f"rows.jsonl:{number}",
            "source": row["source"],
            "step": "1 dedup",
            "reason": reason,
            "detail": json.dumps(detail),
            "row": json.dumps(row, ensure_ascii=False),
        }
        for number, (row, reason, detail) in enumerate(dropped, start=1)
    ]
    pq.write_table(pa.Table.from_pylist(lines, DROPPED), folder / "dropped-00000-of-00001.parquet")
    write_ledger(folder, train, test, dropped, licenses or {})
    return folder


def write_ledger(folder: Path, train: list[Row], test: list[Row], dropped: Any, licenses: dict[str, Any]) -> None:
    """Write the ledger of :func:`write_build`."""
    rows_out = Counter(row["source"] for row in (*train, *test))
    rows_dropped = Counter(row["source"] for row, _, _ in dropped)
    names = sorted(set(rows_out) | set(rows_dropped))
    reasons = {name: Counter(reason for row, reason, _ in dropped if row["source"] == name) for name in names}
    by_source = {
        name: {
            "rows_in": rows_out[name] + rows_dropped[name],
            "rows_out": rows_out[name],
            "added": 0,
            "changed": 0,
            "dropped": dict(sorted(reasons[name].items())),
        }
        for name in names
    }
    out = rows_out.total()
    total = out + rows_dropped.total()
    all_reasons = dict(sorted(sum(reasons.values(), Counter()).items()))
    examples = {
        reason: [
            {"where": f"rows.jsonl:{number}", "id": row["id"], "text": json.dumps(row)[:200], "detail": detail}
            for number, (row, row_reason, detail) in enumerate(dropped, start=1)
            if row_reason == reason
        ][:3]
        for reason in all_reasons
    }
    empty = {"rows_in": total, "rows_out": total, "added": 0, "changed": 0, "dropped": {}}
    steps = [
        {"step": "0 read", **empty, "by_source": {}, "examples": {}, "notes": {}},
        {
            "step": "1 dedup",
            **(empty | {"rows_out": out, "dropped": all_reasons}),
            "by_source": by_source,
            "examples": examples,
            "notes": {"clusters": 1},
        },
    ]
    ledger = {
        "rows_in": total,
        "rows_out": out,
        "added": 0,
        "dropped": all_reasons,
        "splits": {"train": len(train), "test": len(test)},
        "format_choices": {},
        "sources": [
            {
                "source": name,
                "type": "files",
                "part": "split",
                "license": licenses.get(name),
                "identity": {f"{name}.jsonl": "ab" * 32},
                **by_source[name],
            }
            for name in names
        ],
        "steps": steps,
        "digests": {"train": "1" * 64, "test": "2" * 64},
    }
    (folder / "ledger.json").write_text(json.dumps(ledger, indent=1), encoding="utf-8")
