"""Readers of a recipe's sources (local files, the Hub, a Python generator, earlier artifacts), and their identities.

All records are streamed. A record that cannot be read is a ``BadRecord`` in its place, so the caller can continue; a
source that cannot be read at all is a ``UserError``.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.config.recipe.record_mapping import RecordMapping
from align.config.recipe.source_settings import (
    AnnotationsSource,
    ArtifactSource,
    EmbeddedSource,
    FilesSource,
    GymSource,
    HubSource,
    InputSource,
    PythonSource,
    RecordSource,
    Source,
    SplitPart,
    parse_split,
)
from align.config.recipe.templates import lookup, parse_column
from align.config.user_functions import function_identity, load_function
from align.config.user_paths import matching_paths, user_path
from align.config.validation import nearest, plain_value, suggest
from align.data import checkers
from align.data.annotated import annotation_identity, read_annotations
from align.data.families import embedded, gym_tasks
from align.data.formats import DETECTION_RECORDS, Detection, SourceFormat, detect
from align.data.formats.columns import label_rule
from align.data.formats.fields import Malformed, Unusable, present
from align.data.formats.mapping import group_records, map_record, named_columns
from align.data.formats.reading import SUFFIXES, Item, check_record, is_readable, read_file, suggest_file
from align.data.rows import BadRecord, iter_rows
from align.errors import UserError, require_extra
from align.store.fingerprint import file_digest
from align.store.record import RECORD, find_problems, read_artifact, read_record

DATASET_CARD = "README.md"
MAPPED_NAMES = {"better": ("chosen", "rejected"), "grouped": ("responses",)}
"""Fields that a mapping makes."""


@dataclass(frozen=True)
class FormatChoice:
    """A source's format, how ``auto`` came to it (``""`` if the recipe states it), and all of its records."""

    format: SourceFormat
    reason: str
    records: Iterator[Item]


def read(source: Source, base: Path, inputs: Sequence[Path] = (), seed: int = 0) -> Iterator[Item]:
    """Yield the records of a source, in its order, each with its place.

    Relative paths start at ``base``; ``inputs`` are the folders of the data stage's inputs; ``seed`` is the recipe's,
    for the embedded generator. Raises ``UserError`` for a source that cannot be found or opened, and for a column that
    its settings name and no record has.
    """
    records = _records(source, base, inputs, seed)
    if not isinstance(source, RecordSource):
        return records
    records = check_kept_paths(source, check_columns(source.label, named_columns(source), records))
    return records if source.grouped is None else group_records(source.grouped, records)


def _records(source: Source, base: Path, inputs: Sequence[Path], seed: int) -> Iterator[Item]:
    if isinstance(source, FilesSource):
        for path in find_files(source.paths, base):
            yield from _read_file(source, path)
    elif isinstance(source, HubSource):
        yield from _read_hub(source)
    elif isinstance(source, PythonSource):
        yield from _read_python(source)
    elif isinstance(source, EmbeddedSource):
        rows = embedded.generate(source.size, seed, source.families)
        yield from ((f"embedded: row {number}", row) for number, row in enumerate(rows, 1))
    elif isinstance(source, GymSource):
        tasks = gym_tasks.generate(source.named_tasks, source.count, source.seed, source.label)
        yield from ((f"reasoning_gym: row {number}", row) for number, row in enumerate(tasks, 1))
    elif isinstance(source, AnnotationsSource):
        yield from read_annotations(source, base)
    else:
        folder = source_folder(source, base, inputs)
        # The store checks the inputs of a stage; an artifact that is named by its folder is checked here.
        if isinstance(source, ArtifactSource):
            _refuse_damage(folder)
        for split in ("train", "test") if source.split == "all" else (source.split,):
            for number, row in enumerate(iter_rows(folder / f"{split}.parquet"), 1):
                yield (
                    f"{folder.name}/{split}: row {number}",
                    {name: value for name, value in row.items() if value is not None},
                )


def _read_file(source: FilesSource | HubSource, path: Path) -> Iterator[Item]:
    return read_file(path, source.header, source.records, delimiter=source.delimiter, encoding=source.encoding)


def check_columns(label: str, columns: Mapping[str, str], records: Iterator[Item]) -> Iterator[Item]:
    """Yield the records unchanged. Raises ``UserError`` for a column that the settings name and no record has.

    ``columns`` has the setting that names each. A likely misspelling ends the build early: a column that the first
    hundred records lack while they have a field with a similar name. Another one may be a field of later records, so it
    is reported only at the end.
    """
    missing = set(columns)
    names: dict[str, None] = {}
    count = 0
    for item in records:
        if missing and not isinstance(item, BadRecord):
            names |= dict.fromkeys(present(item[1]))
            missing -= names.keys()
            count += 1
            if count == DETECTION_RECORDS:
                # Stop early at a likely misspelling; a column that is merely rare is given until the end.
                misspelled = [name for name in missing if nearest(name, names)]
                if misspelled:
                    raise _no_column(label, columns, misspelled[0], f"the first {count} records", names)
        yield item
    if missing and count:
        raise _no_column(label, columns, min(missing), f"its {count} records", names)


def check_kept_paths(source: RecordSource, records: Iterator[Item]) -> Iterator[Item]:
    """Yield the records unchanged. Raises ``UserError`` for a path of ``keep`` that leads to no value in any record."""
    references = [reference for text in source.kept_columns().values() for reference in parse_column(text).references]
    paths = [reference for reference in references if len(reference.steps) > 1]
    missing = {path for path in paths if not path.is_optional}
    count = 0
    for item in records:
        if missing and not isinstance(item, BadRecord):
            count += 1
            missing = {reference for reference in missing if lookup(reference, item[1]) is None}
        yield item
    if missing and count:
        path = min(reference.text for reference in missing)
        raise UserError(
            f"{source.label}: keep: '{{{path}}}' leads to a value in none of its {count} records. Correct the path, or "
            f"write '{{{path}?}}' if it may be absent from all of them."
        )


def _no_column(label: str, columns: Mapping[str, str], name: str, records: str, names: Iterable[str]) -> UserError:
    near = nearest(name, names)
    return UserError(
        f"{label}: {columns[name]} names the column '{name}', which none of {records} has; they have "
        f"{', '.join(map(repr, names)) or 'no fields'}." + (f" Did you mean '{near}'?" if near else "")
    )


def choose_format(source: Source, records: Iterator[Item], kind: str | None = None) -> FormatChoice:
    """Return the source's format, and all of the records.

    ``format: auto``, and the label of ``better``, look at the first hundred records. Raises ``UserError`` if no
    format or several fit, and for a label that could mean either.
    """
    if not isinstance(source, RecordSource):
        return FormatChoice(SourceFormat(source.format, is_own=True), "", records)
    mapping = {name: getattr(source, name) for name in RecordMapping.model_fields if name in source.model_fields_set}
    settings = SourceFormat(source.format, source.options, RecordMapping(**mapping))
    if source.format != "auto" and source.better is None:
        return FormatChoice(settings, "", records)
    head = list(itertools.islice(records, DETECTION_RECORDS))
    # The records that are looked at are put back in front of the stream.
    records = itertools.chain(head, records)
    readable = [item[1] for item in head if not isinstance(item, BadRecord)]
    bad = next((item for item in head if isinstance(item, BadRecord)), None)
    if not readable and bad is not None:
        raise bad
    if source.better is not None and readable:
        settings = replace(settings, rule=label_rule(source.better, readable, source.label))
    if source.format != "auto":
        return FormatChoice(settings, "", records)
    try:
        detection = _detect(source, readable, settings, kind)
    except UserError as error:
        raise UserError(f"{source.label}: {error}") from None
    return FormatChoice(replace(settings, form=detection.form), detection.reason, records)


def _detect(
    source: RecordSource, records: Sequence[dict[str, Any]], settings: SourceFormat, kind: str | None
) -> Detection:
    """Return the format that only the mapped fields make, if they make any, else the format of all fields."""
    mapped = [fields for record in records if (fields := _mapped_fields(record, settings)) is not None]
    names = [*source.columns, *(MAPPED_NAMES["better"] if source.better else ())]
    names += MAPPED_NAMES["grouped"] if source.grouped else ()
    ignored = source.options.ignore
    # The recipe names mapped fields on purpose, so they may decide by themselves. All fields are the second choice.
    if names and mapped:
        chosen = [{name: fields.get(name) for name in names} for fields in mapped]
        with contextlib.suppress(UserError):
            return detect(chosen, kind, ignored)
    return detect(mapped or records, kind, ignored)


def _mapped_fields(record: dict[str, Any], settings: SourceFormat) -> dict[str, Any] | None:
    """Return a record under the names of its mapping; None if the record makes no row, such as a tie."""
    try:
        return map_record(record, settings.mapping, settings.rule).fields
    except (Malformed, Unusable):
        return None


def _read_hub(source: HubSource) -> Iterator[Item]:
    place = f"the Hub dataset '{source.dataset}' at {source.revision[:12]}"
    try:
        if source.files is not None:
            for path, name in _hub_files(source, place):
                for item in _read_file(source, path):
                    yield _rename_place(item, str(path), f"{source.dataset}/{name}")
            return
        for part in parse_split(source.split):
            yield from _read_split(source, part)
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, unknown config or split, loading script
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{place} could not be read: {reason}\n"
            "Check the network, HF_HUB_OFFLINE, HF_TOKEN for a gated dataset, and the recipe's config and split. To "
            "use local files instead, download them elsewhere and set the data stage's files: "
            "--set 'stages.data.files=[path/to/*.jsonl.gz]'."
        ) from error


def _read_split(source: HubSource, part: SplitPart) -> Iterator[Item]:
    """Yield the records of a split, or of a slice of it; a record's number is its number in the whole split."""
    import datasets

    dataset = datasets.load_dataset(
        source.dataset,
        source.config,
        data_dir=source.data_dir,
        split=part.name,
        revision=source.revision,
        # A share of the rows, or a number counted from the end, needs their number.
        streaming=source.streaming and part.is_stream,
    )
    first, end = part.bounds(None if part.is_stream else len(dataset))
    rows = dataset.skip(first) if first else dataset
    for number, value in enumerate(itertools.islice(rows, None if end is None else max(0, end - first)), first + 1):
        yield f"{source.dataset} {part.name}: record {number}", dict(value)


def _hub_files(source: HubSource, place: str) -> Iterator[tuple[Path, str]]:
    """Yield files of the repository and their names, downloaded into the Hub's cache one by one."""
    import huggingface_hub

    for pattern in source.files or []:
        names = [pattern]
        # A plain path needs no listing of the repository.
        if any(sign in pattern for sign in "*?["):
            all_names = huggingface_hub.list_repo_files(source.dataset, repo_type="dataset", revision=source.revision)
            all_names = [name for name in all_names if name != DATASET_CARD]  # it is about the data, not part of it
            names = sorted(name for name in all_names if fnmatch.fnmatchcase(name, pattern))
            if not names:
                readable = [name for name in all_names if is_readable(Path(name))]
                raise UserError(f"{place} has no file '{pattern}'.{suggest(pattern, readable[:20])}")
        for name in names:
            if not is_readable(Path(name)):
                raise UserError(f"{place}: {name}: unknown kind of file; known are {', '.join(SUFFIXES)}.")
            path = huggingface_hub.hf_hub_download(source.dataset, name, repo_type="dataset", revision=source.revision)
            yield Path(path), name


def _rename_place(item: Item, path: str, name: str) -> Item:
    """Return the item with the file's name in its repository instead of its place in a cache."""
    if isinstance(item, BadRecord):
        return BadRecord(item.where.replace(path, name), item.problem)
    return item[0].replace(path, name), item[1]


def _read_python(source: PythonSource) -> Iterator[Item]:
    function = load_function(source.function, "function")
    number = 0
    try:
        # Each record is checked, since the generator is the user's and may yield anything.
        for number, value in enumerate(function(**source.arguments), 1):
            yield check_record(plain_value(value), f"{source.function}: record {number}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source.function} failed after {number} records with {type(error).__name__}: {error}. It was called with "
            f"{', '.join(f'{name}={value!r}' for name, value in source.arguments.items()) or 'no arguments'}."
        ) from error


def _refuse_damage(folder: Path) -> None:
    """Raise ``UserError`` if an artifact's files differ from its record."""
    artifact_key(folder)
    for problem in find_problems(read_artifact(folder), thorough=True):
        remedy = "The artifact is corrupted; run its pipeline with --rebuild."
        raise UserError(f"{problem.path} {problem.description}. {remedy}")


def identity(source: Source, base: Path, inputs: Sequence[Path] = ()) -> dict[str, str]:
    """Return digests, commits and versions that decide the source's records, by name; the same on every machine.

    Files by sha256 (their folder does not matter), the Hub by commit, a Python generator by the digest of its source
    file, annotations by the digest of their journal, artifacts by their key. A stage's key includes its inputs anyway;
    a recipe built without a stage needs them here. Raises ``UserError`` for a missing file or artifact.
    """
    if isinstance(source, FilesSource):
        return _digests(find_files(source.paths, base))
    if isinstance(source, HubSource):
        return {source.dataset: source.revision}
    if isinstance(source, PythonSource):
        return {source.function: function_identity(source.function, "function")}
    if isinstance(source, EmbeddedSource):
        return {"embedded": f"version {embedded.VERSION}, checks {checkers.VERSION}"}
    if isinstance(source, GymSource):
        require_extra("reasoning_gym", "gym", f"{source.label}:")
        return {"reasoning-gym": importlib.metadata.version("reasoning-gym")}
    if isinstance(source, AnnotationsSource):
        return annotation_identity(source, base)
    folder = source_folder(source, base, inputs)
    return {"artifact" if isinstance(source, ArtifactSource) else f"input {source.index}": artifact_key(folder)}


def find_files(patterns: Sequence[str], base: Path) -> list[Path]:
    """Return the files of paths and globs, sorted, each once. Raises ``UserError`` if a pattern has no match."""
    unique: dict[Path, None] = {}
    for pattern in patterns:
        files = [path for path in matching_paths(pattern, base) if path.is_file()]
        if not files:
            raise UserError(f"no file matches '{pattern}' (searched from {base}).{suggest_file(base / pattern)}")
        for path in files:
            if not is_readable(path):
                raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}.")
            unique[path] = None
    return list(unique)


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    """Return sha256 digests by file name; files of one name in different folders get a number."""
    digests: dict[str, str] = {}
    for path in paths:
        name = path.name
        number = 2
        while name in digests:
            name = f"{path.name} ({number})"
            number += 1
        digests[name] = f"sha256:{file_digest(path)}"
    return digests


def source_folder(source: ArtifactSource | InputSource, base: Path, inputs: Sequence[Path]) -> Path:
    """Return the folder of an earlier artifact. Raises ``UserError`` for an input that the stage does not have."""
    if isinstance(source, ArtifactSource):
        return user_path(source.path, base)
    if source.index >= len(inputs):
        count = f"{len(inputs)} inputs" if inputs else "none"
        raise UserError(
            f"a source reads input {source.index}, and the data stage has {count}. List the stages whose data it "
            "takes under the stage's inputs, counted from 0."
        )
    return inputs[source.index]


def artifact_key(folder: Path) -> str:
    """Return the key in an artifact's record. Raises ``UserError`` for a folder that is no finished artifact."""
    try:
        return str(read_record(folder)["key"])
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no finished artifact (it has no {RECORD}). `align list` shows the finished ones; files of "
            "other programs are read with type: files."
        ) from None
