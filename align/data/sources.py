"""Where records come from (local files, the Hub, a Python generator, earlier artifacts), and each source's identity.

Everything streams: what a source holds is never all in memory. A record that cannot be read is a ``BadRecord`` in its
place, so that the caller may go on; a source that cannot be read at all is a ``UserError``.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from align.config.user_functions import function_identity, load_function
from align.config.user_paths import user_path
from align.config.validation import nearest, suggest
from align.data import checkers, embedded
from align.data.formats import LOOKED_AT, Detection, Form, detect
from align.data.formats.fields import present, renamed
from align.data.reading import SUFFIXES, Item, checked, known, read_file
from align.data.records import BadRecord, Record
from align.data.rows import iter_rows
from align.data.source_configs import (
    ArtifactSource,
    EmbeddedSource,
    FilesSource,
    HubSource,
    InputSource,
    PythonSource,
    Source,
)
from align.errors import UserError
from align.store.fingerprint import file_digest
from align.store.output_files import differing
from align.store.record import RECORD, read_artifact, read_record

__all__ = ["BadRecord", "Item", "Record", "choose_format", "find_files", "identity", "read", "source_folder"]

DATASET_CARD = "README.md"


def read(source: Source, base: Path, inputs: Sequence[Path] = (), seed: int = 0) -> Iterator[Item]:
    """Records of a source, in its order, each with the place where it stands.

    ``base`` is where relative paths start, ``inputs`` the folders the data stage was given, ``seed`` the recipe's,
    which the embedded generator needs. Raises ``UserError`` for a source that cannot be found or opened, and for a
    column to rename that no record has.
    """
    return columns_checked(source.label, source.options.columns, _records(source, base, inputs, seed))


def _records(source: Source, base: Path, inputs: Sequence[Path], seed: int) -> Iterator[Item]:
    if isinstance(source, FilesSource):
        for path in find_files(source.paths, base):
            yield from read_file(path)
    elif isinstance(source, HubSource):
        yield from _read_hub(source)
    elif isinstance(source, PythonSource):
        yield from _read_python(source)
    elif isinstance(source, EmbeddedSource):
        rows = embedded.generate(source.size, seed, source.families)
        yield from ((f"embedded: row {number}", row) for number, row in enumerate(rows, 1))
    else:
        folder = source_folder(source, base, inputs)
        if isinstance(source, ArtifactSource):
            _refuse_damage(folder)
        for split in ("train", "test") if source.split == "all" else (source.split,):
            for number, row in enumerate(iter_rows(folder / f"{split}.parquet"), 1):
                yield f"{folder.name}/{split}: row {number}", {k: v for k, v in row.items() if v is not None}


def columns_checked(label: str, columns: Mapping[str, str], records: Iterator[Item]) -> Iterator[Item]:
    """The records as they are. Raises ``UserError`` for a key of ``columns`` that none of them has.

    A misspelled one ends the build at once: it is missing in the first hundred records, and they have a field whose
    name is like it. A field that comes later is no mistake, so any other key is missed at the end.
    """
    missing, names, count = set(columns), dict[str, None](), 0
    for item in records:
        if missing and not isinstance(item, BadRecord):
            names |= dict.fromkeys(present(item[1]))
            missing -= names.keys()
            count += 1
            slips = [name for name in missing if count == LOOKED_AT and nearest(name, names)]
            if slips:
                raise _no_column(label, slips[0], f"the {count} records looked at", names)
        yield item
    if missing and count:
        raise _no_column(label, min(missing), f"its {count} records", names)


def _no_column(label: str, name: str, records: str, names: Iterable[str]) -> UserError:
    near = nearest(name, names)
    return UserError(
        f"{label}: options.columns renames '{name}', which none of {records} has; they have "
        f"{', '.join(map(repr, names)) or 'no fields'}." + (f" Did you mean '{near}'?" if near else "")
    )


def choose_format(source: Source, records: Iterator[Item], kind: str | None = None) -> tuple[Form, str, Iterator[Item]]:
    """The source's format, why it was chosen (``""`` where the recipe says it), and the records, none of them used up.

    ``format: auto`` looks at the first hundred. Raises ``UserError`` where none or more than one fits them.
    """
    if source.format != "auto":
        return source.format, "", records
    head = list(itertools.islice(records, LOOKED_AT))
    readable = [renamed(item[1], source.options) for item in head if not isinstance(item, BadRecord)]
    bad = next((item for item in head if isinstance(item, BadRecord)), None)
    if not readable and bad is not None:
        raise bad
    try:
        found: Detection = detect(readable, kind)
    except UserError as error:
        raise UserError(f"{source.label}: {error}") from None
    return found.form, found.why, itertools.chain(head, records)


def identity(source: Source, base: Path, inputs: Sequence[Path] = ()) -> dict[str, str]:
    """What the source's records depend on beside its settings, by name; the same on every machine.

    Files by sha256 (their folder does not matter), the Hub by commit, a Python generator by the digest of its own
    source file, artifacts by their key. Inputs enter a stage's key by themselves, but are needed where a recipe is
    built without a stage. Raises ``UserError`` for what is not there.
    """
    if isinstance(source, FilesSource):
        return _digests(find_files(source.paths, base))
    if isinstance(source, HubSource):
        return {source.dataset: source.revision}
    if isinstance(source, PythonSource):
        return {source.function: function_identity(source.function, "function")}
    if isinstance(source, EmbeddedSource):
        return {"embedded": f"version {embedded.VERSION}, checks {checkers.VERSION}"}
    folder = source_folder(source, base, inputs)
    return {"artifact" if isinstance(source, ArtifactSource) else f"input {source.index}": _key(folder)}


def find_files(patterns: Sequence[str], base: Path) -> list[Path]:
    """Files behind paths and globs, in sorted order, each once. Raises ``UserError`` for one that finds nothing."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(Path(name) for name in glob.glob(str(user_path(pattern, base)), recursive=True))
        files = [path for path in matches if path.is_file()]
        if not files:
            raise UserError(f"no file matches '{pattern}' (looked from {base}).{_neighbors(base / pattern)}")
        for path in files:
            if not known(path):
                raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}.")
            found[path] = None
    return list(found)


def _neighbors(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir() if known(p)] if path.parent.is_dir() else []
    return suggest(path.name, names)


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        name, number = path.name, 2
        while name in found:
            name, number = f"{path.name} ({number})", number + 1
        found[name] = f"sha256:{file_digest(path)}"
    return found


def _read_hub(source: HubSource) -> Iterator[Item]:
    place = f"the Hub dataset '{source.dataset}' at {source.revision[:12]}"
    try:
        if source.files is not None:
            for path, name in _hub_files(source, place):
                for item in read_file(path):
                    yield _named(item, str(path), f"{source.dataset}/{name}")
            return
        import datasets

        found = datasets.load_dataset(
            source.dataset,
            source.config,
            data_dir=source.data_dir,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        for number, value in enumerate(found, 1):
            yield f"{source.dataset} {source.split}: record {number}", dict(value)
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, unknown config or split, loading script
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{place} could not be read: {reason}\n"
            "Check the network, HF_HUB_OFFLINE, HF_TOKEN for a gated dataset, and the recipe's config and split. To "
            "use local files instead, download them elsewhere and set the data stage's files: "
            "--set 'stages.data.files=[path/to/*.jsonl.gz]'."
        ) from error


def _hub_files(source: HubSource, place: str) -> Iterator[tuple[Path, str]]:
    """Files of the repository, fetched into the Hub's cache one by one."""
    import huggingface_hub

    for pattern in source.files or []:
        names = [pattern]
        if any(sign in pattern for sign in "*?["):
            every = huggingface_hub.list_repo_files(source.dataset, repo_type="dataset", revision=source.revision)
            every = [name for name in every if name != DATASET_CARD]  # about the data, and no document of it
            names = sorted(name for name in every if fnmatch.fnmatchcase(name, pattern))
            if not names:
                readable = [name for name in every if known(Path(name))]
                raise UserError(f"{place} has no file '{pattern}'.{suggest(pattern, readable[:20])}")
        for name in names:
            if not known(Path(name)):
                raise UserError(f"{place}: {name}: unknown kind of file; known are {', '.join(SUFFIXES)}.")
            fetched = huggingface_hub.hf_hub_download(
                source.dataset, name, repo_type="dataset", revision=source.revision
            )
            yield Path(fetched), name


def _named(item: Item, path: str, name: str) -> Item:
    """The item under the file's name in its repository instead of its place in a cache."""
    if isinstance(item, BadRecord):
        return BadRecord(item.where.replace(path, name), item.problem)
    return item[0].replace(path, name), item[1]


def _read_python(source: PythonSource) -> Iterator[Item]:
    function = load_function(source.function, "function")
    number = 0
    try:
        for number, value in enumerate(function(**source.arguments), 1):
            yield checked(value, f"{source.function}: record {number}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source.function} failed after {number} records with {type(error).__name__}: {error}. It was called with "
            f"{', '.join(f'{name}={value!r}' for name, value in source.arguments.items()) or 'no arguments'}."
        ) from error


def source_folder(source: ArtifactSource | InputSource, base: Path, inputs: Sequence[Path]) -> Path:
    """Where an earlier artifact is. Raises ``UserError`` for an input that the stage was not given."""
    if isinstance(source, ArtifactSource):
        return user_path(source.path, base)
    if source.index >= len(inputs):
        given = f"{len(inputs)} inputs" if inputs else "none"
        raise UserError(
            f"a source reads input {source.index}, and the data stage was given {given}. List the stages whose data it "
            "takes under the stage's inputs, counted from 0."
        )
    return inputs[source.index]


def _key(folder: Path) -> str:
    """The key in an artifact's record. Raises ``UserError`` for a folder that is no finished artifact."""
    try:
        return str(read_record(folder)["key"])
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no finished artifact (it has no {RECORD}). `align list` shows the finished ones; files of "
            "other programs are read with type: files."
        ) from None


def _refuse_damage(folder: Path) -> None:
    """Raise ``UserError`` where an artifact's files are not what its key stands for."""
    _key(folder)
    for problem in differing(read_artifact(folder), thorough=True):
        raise UserError(f"{problem.path} {problem.what}. The artifact is corrupted; run its pipeline with --rebuild.")
