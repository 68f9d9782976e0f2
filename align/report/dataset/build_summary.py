"""Summary of a build's rows for the preview page: samples of each source, lengths, turns, clusters of duplicates.

It reads the rows once and the dropped rows twice, a batch at a time. Its memory does not grow with the rows, except for
8 bytes per duplicate. Samples are chosen by their ids, so they are the same on every machine. Torch-free.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from align.data.builds.build_files import SPLITS, batches, row_of_batch
from align.data.rows import Row
from align.report.page.panels import COLORS, LINES, Panel, legend_name, nth, styled

MAX_SOURCES = 24
"""Sources with samples on the page, the largest first."""
SAMPLES_PER_SOURCE = 3
MAX_CLUSTERS = 8
MAX_MEMBERS = 4
"""Clusters of duplicates on the page, and dropped rows shown of each."""
MAX_TURNS = 20
"""Longer conversations are counted as having this many turns."""
EDGES = np.unique(np.round(2.0 ** (np.arange(0, 4 * 22 + 1) / 4)).astype(np.int64))
"""Bins of lengths in characters, four to a doubling, up to four million."""
ANSWERS = ("completion", "chosen", "rejected")
INSTEAD = '"instead"'
_Sample = tuple[tuple[int, str], str, Row]
"""A row with its rank (checksum, id) and its split."""


@dataclass
class Lengths:
    """Histograms of one source: characters by bin of :data:`EDGES` (the last bin is open), turns, rows by split.

    Plain texts have the side ``text`` among the answers, and no prompt and no turns.
    """

    prompt: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGES), np.int64))
    answers: dict[str, np.ndarray] = field(default_factory=dict)
    turns: np.ndarray = field(default_factory=lambda: np.zeros(MAX_TURNS + 1, np.int64))
    rows: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Rows of all splits."""
        return sum(self.rows.values())


@dataclass
class Cluster:
    """Dropped duplicates and the row kept instead of them.

    ``instead`` is the id and place of that row, as the ledger has it; ``kept`` is the row itself, if
    the build has it.
    """

    instead: dict[str, str]
    size: int
    kept: Row | None = None
    members: list[dict[str, Any]] = field(default_factory=list)
    """``row``, ``where``, ``step``, ``reason``, ``detail``."""


@dataclass
class BuildSummary:
    """Lengths and samples of a build by source, its largest clusters, and the number of dropped duplicates."""

    lengths: dict[str, Lengths]
    samples: dict[str, list[tuple[str, Row]]]
    """Source → (split, row)."""
    clusters: list[Cluster]
    duplicates: int


def summarize(folder: Path) -> BuildSummary:
    """Return a summary of the rows of the build in ``folder``."""
    clusters, duplicates = _largest_clusters(folder)
    # The kept rows of the clusters are found in the same pass that counts lengths and draws samples.
    clusters_by_id: dict[str, list[Cluster]] = defaultdict(list)
    for cluster in clusters:
        clusters_by_id[cluster.instead.get("id", "")].append(cluster)
    lengths: dict[str, Lengths] = defaultdict(Lengths)
    samples_of: dict[str, list[_Sample]] = defaultdict(list)
    for split in SPLITS:
        for batch in batches(folder, split):
            sources = batch.column("source").to_pylist()
            ids = batch.column("id").to_pylist()
            _count_lengths(batch, split, sources, lengths)
            _draw_samples(batch, split, sources, ids, samples_of)
            for index, row_id in enumerate(ids) if clusters else ():
                for cluster in clusters_by_id.get(row_id, ()):
                    cluster.kept = cluster.kept or row_of_batch(batch, index)
    largest = sorted(samples_of, key=lambda name: (-lengths[name].total, name))[:MAX_SOURCES]
    samples = {name: [(split, row) for _, split, row in samples_of[name]] for name in largest}
    return BuildSummary(dict(lengths), samples, clusters, duplicates)


def _draw_samples(
    batch: pa.RecordBatch, split: str, sources: list[str], ids: list[str], samples_of: dict[str, list[_Sample]]
) -> None:
    """Keep for each source the rows whose ids have the lowest checksums, in order.

    A checksum is as good as a random draw. It depends only on the id, not on the order of rows or on a seed, so the
    page shows the same rows after every build.
    """
    for index, (source, row_id) in enumerate(zip(sources, ids, strict=True)):
        rank = (zlib.crc32(str(row_id).encode()), str(row_id))
        samples = samples_of[source]
        if len(samples) < SAMPLES_PER_SOURCE or rank < samples[-1][0]:
            samples.append((rank, split, row_of_batch(batch, index)))
            samples.sort(key=lambda sample: sample[0])
            del samples[SAMPLES_PER_SOURCE:]


def _count_lengths(batch: pa.RecordBatch, split: str, sources: list[str], lengths: dict[str, Lengths]) -> None:
    """Add a batch's characters, turns and rows to the histograms of its sources."""
    # Encode source names as small numbers, so one comparison finds each source's rows.
    names, codes = np.unique(np.array(sources, dtype=object).astype(str), return_inverse=True)
    has_prompts = "prompt" in batch.schema.names
    if has_prompts:
        prompt, turns = _characters(batch.column("prompt"))
        answers = {name: _characters(batch.column(name))[0] for name in ANSWERS if name in batch.schema.names}
    else:
        answers = {"text": pc.utf8_length(batch.column("text")).to_numpy(zero_copy_only=False)}
    # Sources are few and rows many: numpy handles all rows of a source at once.
    for code, name in enumerate(names.tolist()):
        mask = codes == code
        histograms = lengths[name]
        histograms.rows[split] += int(mask.sum())
        if has_prompts:
            histograms.prompt += _histogram(prompt[mask])
            histograms.turns += np.bincount(np.minimum(turns[mask], MAX_TURNS), minlength=MAX_TURNS + 1)
        for side, sizes in answers.items():
            histograms.answers.setdefault(side, np.zeros(len(EDGES), np.int64))
            histograms.answers[side] += _histogram(sizes[mask])


def _histogram(sizes: np.ndarray) -> np.ndarray:
    """Return counts by bin of :data:`EDGES`."""
    return np.bincount(np.searchsorted(EDGES, np.maximum(sizes, 1), side="right") - 1, minlength=len(EDGES))


def _characters(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters and the number of messages in each row's list of messages; an empty field has 0 of both."""
    contents = pc.struct_field(pc.list_flatten(column), "content")
    sizes = np.asarray(pc.fill_null(pc.utf8_length(contents), 0), dtype=np.int64)
    # The messages of all rows are in one flat array; sum their lengths by the row that each belongs to.
    parents = np.asarray(pc.list_parent_indices(column), dtype=np.int64)
    characters = np.bincount(parents, weights=sizes, minlength=len(column)).astype(np.int64)
    return characters, np.bincount(parents, minlength=len(column))


def _largest_clusters(folder: Path) -> tuple[list[Cluster], int]:
    """Return the largest clusters of dropped duplicates, and the number of all dropped duplicates.

    The first pass counts duplicates by a 64-bit hash of the row kept instead; the second reads the largest clusters.
    """
    hashes = array("Q")
    # The first pass counts clusters by a hash of the row that stays: eight bytes for each dropped row.
    for instead, _ in _dropped_duplicates(folder):
        hashes.append(_hash(instead))
    if not hashes:
        return [], 0
    unique, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
    order = np.lexsort((unique, -counts))[:MAX_CLUSTERS]
    sizes = {int(unique[index]): int(counts[index]) for index in order}
    clusters: dict[int, Cluster] = {}
    for instead, line in _dropped_duplicates(folder):
        key = _hash(instead)
        # The second pass keeps members of the largest clusters only.
        if key not in sizes:
            continue
        cluster = clusters.setdefault(key, Cluster(instead, sizes[key]))
        if len(cluster.members) < MAX_MEMBERS:
            cluster.members.append({**line, "row": _parse(line["row"]), "detail": _parse(line["detail"])})
    ordered = sorted(clusters.values(), key=lambda cluster: (-cluster.size, cluster.instead["where"]))
    return ordered, len(hashes)


def _dropped_duplicates(folder: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Yield (row kept instead, line of the dropped rows) of each duplicate."""
    for batch in batches(folder, "dropped"):
        duplicates = batch.filter(pc.match_substring(batch.column("detail"), INSTEAD))
        for line in duplicates.to_pylist():
            instead = _parse(line["detail"]).get("instead")
            # Steps write the id and the place of a row, or only the id.
            if instead and not isinstance(instead, dict):
                instead = {"id": instead}
            if instead:
                yield {name: str(instead.get(name, "")) for name in ("id", "where")}, line


def _hash(instead: dict[str, str]) -> int:
    text = f"{instead['id']}\0{instead['where']}".encode("utf-8", "surrogatepass")
    # Two checksums of 32 bits, of the text and of its reverse: fast, and the same in every process.
    return (zlib.crc32(text) << 32) | zlib.crc32(text[::-1])


def _parse(text: str) -> dict[str, Any]:
    """Return a JSON object; an empty dict for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def quantile(counts: Iterable[int], share: float) -> int:
    """Return the lower edge of the bin of :data:`EDGES` that holds the quantile ``share``; 0 for no rows."""
    numbers = np.asarray(list(counts))
    if numbers.sum() == 0:
        return 0
    return int(EDGES[np.searchsorted(np.cumsum(numbers), share * numbers.sum())])


MAX_LABEL_LENGTH = 28
MAX_OUTLINES = 6
"""Maximum number of sources with a separate outline; the others are merged."""
CAPTIONS = {"completion": ("answer", "Answers."), "chosen": ("answer", "Chosen answers."), "text": ("text", "Texts.")}
"""Side → the subject of its axis, and the caption of its plot."""


def length_plots(lengths: Mapping[str, Lengths]) -> list[tuple[Markup, str]]:
    """Return each plot with its caption; plain texts have none of prompts and turns."""
    groups = merge_small_sources(lengths)
    total = _sum(groups.values())
    has_prompts = bool(total.prompt.any())
    plots = []
    if has_prompts:
        prompts = {name: group.prompt for name, group in groups.items()}
        plots.append((plot_lengths(prompts, "prompt"), "Prompts, all turns together."))
    for side, (subject, caption) in CAPTIONS.items():
        counts = {name: group.answers[side] for name, group in groups.items() if side in group.answers}
        if counts:
            plots.append((plot_lengths(counts, subject), caption))
    if "chosen" in total.answers and "rejected" in total.answers:
        pair = {side: total.answers[side] for side in ("chosen", "rejected")}
        caption = "Both sides of all pairs: a model can learn that longer is better."
        plots.append((plot_lengths(pair, "answer"), caption))
    if has_prompts:
        plots.append((plot_turns(groups), "Messages in the prompt; 1 is a single question."))
    return plots


def merge_small_sources(lengths: Mapping[str, Lengths]) -> dict[str, Lengths]:
    """Return the largest sources, and all others as one."""
    # Sort by size, then by name, so the same build always gets the same colors.
    order = sorted(lengths, key=lambda name: (-lengths[name].total, name))
    # One source more than the limit is drawn as itself, because "1 others" would not save an outline.
    if len(order) <= MAX_OUTLINES + 1:
        return {name: lengths[name] for name in order}
    rest = order[MAX_OUTLINES:]
    largest = {name: lengths[name] for name in order[:MAX_OUTLINES]}
    return largest | {f"{len(rest)} others": _sum(lengths[name] for name in rest)}


def _sum(parts: Iterable[Lengths]) -> Lengths:
    total = Lengths()
    for part in parts:
        total.prompt = total.prompt + part.prompt
        total.turns = total.turns + part.turns
        total.rows.update(part.rows)
        for side, counts in part.answers.items():
            total.answers[side] = total.answers.get(side, 0) + counts
    return total


@styled
def plot_lengths(counts: Mapping[str, np.ndarray], subject: str) -> Markup:
    """Draw the share of rows by length in characters on a logarithmic axis, with an outline for each name.

    ``subject`` says what is measured: a prompt, an answer or a text.
    """
    from matplotlib.ticker import FuncFormatter

    panel = Panel()
    # Only bins with rows are drawn, of the millions of characters that the bins cover.
    used = np.flatnonzero(sum(counts.values(), np.zeros(len(EDGES), np.int64)))
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 1)
    # The axis ends one empty bin beyond the shortest and the longest row.
    edges = np.r_[EDGES, EDGES[-1] * 2][max(0, first - 1) : last + 3]
    for index, (name, numbers) in enumerate(counts.items()):
        if numbers.sum():
            part = numbers[max(0, first - 1) : last + 2]
            panel.axes.stairs(
                part / numbers.sum(),
                edges[: len(part) + 1],
                color=nth(COLORS, index),
                linestyle=nth(LINES, index),
                linewidth=1.5,
                label=legend_name(name, MAX_LABEL_LENGTH),
            )
    panel.axes.set_xscale("log", base=2)
    panel.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.axes.set_xlabel(f"characters of the {subject}")
    panel.axes.set_ylabel("share of rows")
    if len(counts) > 1:
        panel.figure.legend(loc="outside upper center", ncols=2)
    return panel.svg(f"Lengths of the {subject} in characters, by {', '.join(counts)}")


@styled
def plot_turns(groups: Mapping[str, Lengths]) -> Markup:
    """Draw the share of rows by messages in the prompt."""
    panel = Panel()
    used = np.flatnonzero(_sum(groups.values()).turns)
    longest = int(used[-1]) if len(used) else 1
    width = 0.8 / max(1, len(groups))
    for index, (name, group) in enumerate(groups.items()):
        # The bars of a count of messages are side by side, centered on it.
        positions = np.arange(longest + 1) + (index - (len(groups) - 1) / 2) * width
        panel.axes.bar(
            positions[1:],
            group.turns[1 : longest + 1] / max(1, group.total),
            width,
            color=nth(COLORS, index),
            label=legend_name(name, MAX_LABEL_LENGTH),
        )
    ticks: Sequence[int] = range(1, longest + 1) if longest <= 10 else range(1, longest + 1, 3)
    panel.axes.set_xticks(list(ticks), [f"{tick}+" if tick == MAX_TURNS else str(tick) for tick in ticks])
    panel.axes.set_xlabel("messages in the prompt")
    panel.axes.set_ylabel("share of rows")
    panel.axes.grid(axis="x", visible=False)
    if len(groups) > 1:
        panel.figure.legend(loc="outside upper center", ncols=2)
    return panel.svg(f"Messages in prompts, by {', '.join(groups)}")
