"""Stages that hand over the harness's rows, and plain texts, for runs of whole pipelines. Torch-free."""

from __future__ import annotations

from typing import Any

from align.config.base import Config
from align.pipeline.context import StageContext
from align.registry import Stage
from align.store.artifacts import Kind


class GivenRowsConfig(Config):
    """How many rows there are."""

    train: int = 40
    test: int = 12


def given_rows(context: StageContext) -> dict[str, Any]:
    """Pairs, which serve every stage that trains on rows."""
    from align.data.rows import write_rows
    from tests.support.training.harness import rows

    config = context.config
    write_rows(context.output / "train.parquet", rows(config.train))
    write_rows(context.output / "test.parquet", rows(config.test, start=config.train))
    return {}


def given_texts(context: StageContext) -> dict[str, Any]:
    """The rows' answers as plain texts."""
    from align.data.rows import write_rows
    from tests.support.training.harness import rows

    config = context.config
    for split, count, start in (("train", config.train, 0), ("test", config.test, config.train)):
        texts = [row["chosen"][-1]["content"] for row in rows(count, start=start)]
        new_rows = [{"id": str(index), "source": "given", "text": text} for index, text in enumerate(texts)]
        write_rows(context.output / f"{split}.parquet", new_rows)
    return {}


ROWS = Stage(
    "given_rows", 1, Kind.PREFERENCES, f"{__name__}:GivenRowsConfig", f"{__name__}:given_rows", "rows",
    f"{__name__}:ROWS",
)  # fmt: skip
TEXTS = Stage(
    "given_texts", 1, Kind.TEXTS, f"{__name__}:GivenRowsConfig", f"{__name__}:given_texts", "texts",
    f"{__name__}:TEXTS",
)  # fmt: skip
