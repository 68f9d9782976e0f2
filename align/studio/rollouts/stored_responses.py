"""Search in stored rollouts with pyarrow: conditions, order, and the rows of one page. Torch-free.

Conditions are checked on the columns that they need. The texts are read for the rows of the page only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pydantic import BaseModel, ConfigDict, Field

from align.store.rollouts import checked_files, rollout_dataset, rollout_rows

PLACE = ("update", "split", "round", "index")
"""Columns that identify a response of a folder."""
NUMBERS = ("score", "kl", "tokens", "gold")
ORDERS = {"newest": ("update", "descending"), "oldest": ("update", "ascending")} | {
    f"{end}_{name}": (name, "ascending" if end == "lowest" else "descending")
    for end in ("lowest", "highest")
    for name in NUMBERS
}
"""Order -> column and direction."""
MAX_ROWS = 50
MAX_WORDS = 200
TEXT_COLUMNS = (
    *PLACE,
    *("prompt_id", "prompt", "reference", "response", "score", "scores", "reasons", "explanation", "gold", "kl"),
    *("tokens", "finished", "learned", "thought_tokens", "messages", "calls", "turns", "stop", "failure"),
)

Order = Literal[
    "newest", "oldest", "lowest_score", "highest_score", "lowest_kl", "highest_kl", "lowest_tokens", "highest_tokens",
    "lowest_gold", "highest_gold",
]  # fmt: skip


class ResponseQuery(BaseModel):
    """Conditions and order of responses; a condition that is not set holds for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_update: int | None = None
    last_update: int | None = None
    prompt_id: str | None = None
    min_score: float | None = None
    max_score: float | None = None
    min_kl: float | None = None
    max_kl: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    part: str | None = None
    """Part of the score that ``min_score`` and ``max_score`` mean instead of the total."""
    reason: str | None = None
    """Reason of a reward, such as ``timed_out``."""
    finished: bool | None = None
    words: Annotated[str, Field(max_length=MAX_WORDS)] | None = None
    """Text that the response contains, in any case of letters."""
    order: Order = "newest"
    limit: int = Field(10, ge=1, le=MAX_ROWS)
    offset: int = Field(0, ge=0)

    def condition(self) -> pc.Expression | None:
        """Return the conditions that columns can answer; None without any."""
        terms = []
        bounds = (
            ("update", self.first_update, self.last_update),
            ("kl", self.min_kl, self.max_kl),
            ("tokens", self.min_tokens, self.max_tokens),
            *((("score", self.min_score, self.max_score),) if self.part is None else ()),
        )
        for name, low, high in bounds:
            if low is not None:
                terms.append(pc.field(name) >= low)
            if high is not None:
                terms.append(pc.field(name) <= high)
        if self.prompt_id is not None:
            terms.append(pc.field("prompt_id") == self.prompt_id)
        if self.finished is not None:
            terms.append(pc.field("finished") == self.finished)
        if self.words:
            terms.append(pc.match_substring(pc.field("response"), self.words, ignore_case=True))
        condition = None
        for term in terms:
            condition = term if condition is None else condition & term
        return condition

    @property
    def has_map_condition(self) -> bool:
        """True if a condition is about parts of the score or reasons."""
        return self.part is not None or self.reason is not None

    def holds_for(self, scores: dict[str, float], reasons: dict[str, str]) -> bool:
        """Return True if the conditions on parts of the score and on reasons hold."""
        if self.reason is not None and self.reason not in reasons.values():
            return False
        if self.part is None:
            return True
        value = scores.get(self.part)
        if value is None:
            return False
        is_high_enough = self.min_score is None or value >= self.min_score
        return is_high_enough and (self.max_score is None or value <= self.max_score)


def find_responses(folder: Path, query: ResponseQuery) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a page, and the number of rows that meet the conditions."""
    column, direction = ORDERS[query.order]
    columns = list(dict.fromkeys([*PLACE, column, *(("scores", "reasons") if query.has_map_condition else ())]))
    data = rollout_dataset(checked_files(folder))
    table = data.to_table(columns=columns, filter=query.condition())
    if query.has_map_condition:
        table = table.filter(pa.array(list(_map_matches(table, query)), pa.bool_()))
    keys = [(column, direction), *((name, "ascending") for name in PLACE if name != column)]
    # Rows without a value come last in both directions.
    page = table.select(PLACE if column in PLACE else [*PLACE, column]).sort_by(keys).slice(query.offset, query.limit)
    places = [tuple(row[name] for name in PLACE) for row in page.to_pylist()]
    rows = {place_of(row): row for row in _rows_at(data, places)}
    return [rows[place] for place in places if place in rows], len(table)


def _map_matches(table: pa.Table, query: ResponseQuery) -> Iterator[bool]:
    for batch in table.select(["scores", "reasons"]).to_batches():
        for row in batch.to_pylist(maps_as_pydicts="lossy"):
            yield query.holds_for(row["scores"] or {}, row["reasons"] or {})


def _rows_at(data: ds.Dataset, places: list[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Yield the responses of the updates, rounds and indices in ``places``, and perhaps others."""
    if not places:
        return
    updates, _, rounds, indices = zip(*places, strict=True)
    update = pc.field("update")
    in_updates = update.isin([value for value in updates if value is not None])
    if None in updates:
        in_updates = in_updates | update.is_null()
    condition = in_updates & pc.field("round").isin(sorted(set(rounds))) & pc.field("index").isin(sorted(set(indices)))
    yield from rollout_rows(data, TEXT_COLUMNS, filter=condition)


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the identity of a response in its folder."""
    return tuple(row[name] for name in PLACE)


def find_response(folder: Path, place: tuple[Any, ...]) -> dict[str, Any] | None:
    """Return the response at a place; None if the folder has none."""
    data = rollout_dataset(checked_files(folder))
    return next((row for row in _rows_at(data, [place]) if place_of(row) == place), None)
