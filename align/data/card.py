"""The dataset card: README.md with the Hub's metadata, which let ``load_dataset(folder)`` read a build.

Its content comes from the recipe, the ledger and the Parquet files, and does not depend on time or place. It states a
language only if the recipe does. It quotes no dropped rows, which may be private. Torch-free.

A license is represented by the obligations that it puts on whoever passes the data on. A mixture has the obligations of
all its parts. If one part's license has every obligation of the others, it is the mixture's license; otherwise no
known license fits, and a person must read all of them. This is bookkeeping, not legal advice. Excluded: the terms of
use of a language model for its outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from align.data.builds.build_files import SPLITS, shards
from align.errors import printable
from align.store.json_files import write_text_atomically

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

CARD = "README.md"
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")
"""The Hub's categories of datasets by their rows, a factor of ten apart."""
TAGS = {
    "instructions": ["sft"],
    "preferences": ["dpo", "reward-model"],
    "unpaired": ["kto"],
    "prompts": ["rl"],
    "texts": ["pretraining"],
}
COLUMNS = {
    "id": "stable text that names the row",
    "source": "where it comes from",
    "completion": "the assistant's answer",
    "prompt": "messages; the last is the user's",
    "checks": "JSON for a program that checks the answer, or empty",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "label": "whether the answer is desirable",
    "tools": "JSON list of the tools that may be called, or empty",
    "responses": "answers with scores or ranks",
    "text": "a document",
    "chosen_score": "score of the better answer",
    "rejected_score": "score of the worse answer",
}
"""Descriptions of the columns."""


def write_card(folder: Path, recipe: Mapping[str, Any], ledger: Mapping[str, Any], name: str) -> Path:
    """Write ``folder/README.md`` about the build in ``folder`` and return its path.

    ``recipe`` is the recipe as plain JSON-able values, printed in full; ``name`` is the dataset's name.
    """
    license = mixture_license(source.get("license") for source in ledger["sources"])
    data = metadata(folder, recipe, ledger, name, license)
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(folder, recipe, ledger, name, license)) + "\n"
    path = folder / CARD
    write_text_atomically(path, text)
    return path


def read_recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe on a build's card; empty if the card is missing or not align's."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        match = re.search(r"^## Recipe\n\n(`{3,})yaml\n(.*)\n\1$", text, re.DOTALL | re.MULTILINE)
        recipe = yaml.safe_load(match[2]) if match else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def read_name(folder: Path) -> str:
    """Return the name on a build's card, else the folder's name."""
    try:
        front = (folder / CARD).read_text(encoding="utf-8").split("---")[1]
        name = (yaml.safe_load(front) or {}).get("pretty_name")
    except (OSError, UnicodeDecodeError, IndexError, AttributeError, yaml.YAMLError):
        name = None
    return str(name or folder.resolve().name)


def metadata(
    folder: Path, recipe: Mapping[str, Any], ledger: Mapping[str, Any], name: str, license: License
) -> DatasetCardData:
    """Return the Hub's metadata: ``configs`` has the Parquet files of a split, ``dataset_info`` features and sizes."""
    import pyarrow.parquet as pq
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    sources = recipe.get("sources") or []
    # The Hub links a card to the datasets it was made from.
    hub_sources = [source for source in sources if source.get("type") == "hub"]
    hub = sorted({str(source["dataset"]) for source in hub_sources if "dataset" in source})
    data = DatasetCardData(
        language=_languages(recipe),
        license=license.names[0] if len(license.names) == 1 else list(license.names),
        pretty_name=printable(name),
        size_categories=[size_category(ledger["rows_out"])],
        task_categories=["text-generation"],
        source_datasets=hub or ["original"],
        tags=["align", *TAGS.get(str(recipe.get("kind")), [])],
    )
    if license.names == (OTHER,):
        data["license_name"] = "terms-of-all-sources"
        data["license_link"] = f"{CARD}#licenses"
    files = {split: shards(folder, split) for split in SPLITS}
    files = {split: paths for split, paths in files.items() if paths}
    splits = SplitDict()
    features = None
    bytes_on_disk = 0
    # Sizes come from the footers of the Parquet files, without reading rows.
    for split, paths in files.items():
        parts = [pq.read_metadata(path) for path in paths]
        size = sum(part.row_group(group).total_byte_size for part in parts for group in range(part.num_row_groups))
        splits.add(SplitInfo(split, num_bytes=size, num_examples=sum(part.num_rows for part in parts)))
        bytes_on_disk += sum(path.stat().st_size for path in paths)
        features = features or Features.from_arrow_schema(parts[0].schema.to_arrow_schema())
    data_files = [{"split": split, "path": _pattern(paths, split)} for split, paths in files.items()]
    data["configs"] = [{"config_name": "default", "data_files": data_files}]
    info = DatasetInfo(features=features, splits=splits, download_size=bytes_on_disk)
    info.dataset_size = sum(split.num_bytes for split in splits.values())
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data


def _pattern(paths: Sequence[Path], split: str) -> str:
    return paths[0].name if len(paths) == 1 and "-of-" not in paths[0].name else f"{split}-*-of-*.parquet"


def size_category(rows: int) -> str:
    """Return the Hub's category for a number of rows."""
    return SIZES[min(max(len(str(rows)) - 3, 0), len(SIZES) - 1)]


def _languages(recipe: Mapping[str, Any]) -> list[str] | None:
    """Return the languages that the recipe states: its field, else those that a filter keeps. Never a guess."""
    stated = recipe.get("language")
    for step in recipe.get("steps") or []:
        filtered = step.get("language")
        stated = stated or (filtered.get("keep") if isinstance(filtered, Mapping) else None)
    if not stated:
        return None
    return [str(stated)] if isinstance(stated, str) else sorted(str(language) for language in stated)


def _body(folder: Path, recipe: Mapping[str, Any], ledger: Mapping[str, Any], name: str, license: License) -> list[str]:
    kind = str(recipe.get("kind", "rows"))
    lines = [f"# {plain(name)}", ""]
    if recipe.get("description"):
        lines += [printable(str(recipe["description"])).strip(), ""]
    counts = ", ".join(f"{count:,} {split}" for split, count in ledger["splits"].items())
    lines += [
        f"{ledger['rows_out']:,} rows of kind `{kind}` ({counts}), built from {ledger['rows_in']:,} records by the "
        f"recipe below. {sum(ledger['dropped'].values()):,} rows were dropped, each for a reason counted below.",
        "",
        "```python",
        "from datasets import load_dataset",
        'rows = load_dataset("path/to/this/folder")',
        "```",
        "",
    ]
    lines += ["## Sources", "", *_sources(ledger), ""]
    lines += ["## Licenses", "", f"**{', '.join(license.names)}.** {plain(license.reason)}", ""]
    lines += [f"- {plain(concern)}." for concern in license.concerns]
    lines += [""] if license.concerns else []
    lines += ["## Splits and columns", "", *_splits(folder, ledger), ""]
    lines += ["## Steps", "", *_steps(ledger), ""]
    for source, choice in (ledger.get("format_choices") or {}).items():
        lines.append(f"- Format of {plain(source)}: {plain(choice)}")
    lines += [""] if ledger.get("format_choices") else []
    text = printable(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=110))
    return [*lines, "## Recipe", "", *fenced(text, "yaml")]


def _sources(ledger: Mapping[str, Any]) -> list[str]:
    rows = []
    for line in ledger["sources"]:
        license = normalize_license(line.get("license"))
        identity = "; ".join(
            f"{key} {value}" if key != value else str(key) for key, value in _pairs(line.get("identity"))
        )
        part = str(line.get("part"))
        rows.append(
            (
                line["source"],
                line["type"],
                "**not known**" if license == "unknown" else license,
                "both, by prompt" if part == "split" else part,
                f"{line['rows_in']:,}",
                f"{line['rows_out']:,}",
                _share(line["rows_out"], ledger["rows_out"]),
                identity or "–",
            )
        )
    head = ("source", "type", "license", "goes to", "records", "rows", "share", "identity")
    return table(head, rows, numbers=range(4, 7))


def _splits(folder: Path, ledger: Mapping[str, Any]) -> list[str]:
    import pyarrow.parquet as pq

    digests = ledger.get("digests") or {}
    rows = [
        (split, f"{count:,}", f"{len(shards(folder, split))}", f"`{str(digests.get(split, '–'))[:16]}`")
        for split, count in ledger["splits"].items()
    ]
    lines = table(("split", "rows", "files", "digest of its rows"), rows, numbers=(1, 2))
    first = next((paths[0] for split in SPLITS if (paths := shards(folder, split))), None)
    names = pq.read_schema(first).names if first is not None else []
    lines += [
        "",
        *(f"- `{plain(name)}`: {COLUMNS.get(name, 'kept from the source, or added by a step')}" for name in names),
    ]
    return [*lines, "", "No text is in both splits." if "text" in names else "No prompt is in both splits."]


def _steps(ledger: Mapping[str, Any]) -> list[str]:
    rows = []
    for line in ledger.get("steps") or []:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in line["dropped"].items()) or "–"
        rows.append(
            (
                line["step"],
                f"{line['rows_in']:,}",
                f"{line['added']:,}",
                f"{line.get('changed', 0):,}",
                f"{line['rows_out']:,}",
                reasons,
            )
        )
    head = ("step", "rows in", "added", "changed", "rows out", "dropped")
    return [*table(head, rows, numbers=range(1, 5)), "", "In every line: rows in + added = rows out + dropped."]


def _pairs(identity: Any) -> Iterable[tuple[str, str]]:
    """Return names and values of an identity, which is a mapping of names to digests or commits, or one text."""
    if isinstance(identity, Mapping):
        return [(str(key), _short(str(value))) for key, value in identity.items()]
    return [("", str(identity))] if identity else []


def _short(value: str) -> str:
    """Shorten sha256 digests, which are long for a table. A commit stays, since only a full one can be used."""
    return re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1…", value)


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else "–"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> list[str]:
    """Return the lines of a Markdown table with escaped cells; columns in ``numbers`` are aligned to the right."""
    right = set(numbers)
    rule = ["---:" if index in right else "---" for index in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(rule)} |"]
    lines += [f"| {' | '.join(_cell(str(cell)) for cell in row)} |" for row in rows]
    return lines


def _cell(text: str) -> str:
    is_markup = text == "**not known**" or re.fullmatch(r"`[0-9a-f–]+`", text)
    return text if is_markup else plain(text)


def plain(text: str) -> str:
    """Return a text escaped for Markdown: one line, no markup, no HTML, no links."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&])", r"\\\1", " ".join(printable(text).split()))


def fenced(text: str, language: str) -> list[str]:
    """Return the lines of a code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence]


UNKNOWN = "unknown"
OTHER = "other"

_CREDIT = frozenset({"credit"})
_NC = frozenset({"credit", "non-commercial"})
_ND = frozenset({"credit", "no derivatives"})
_CC_SA = frozenset({"credit", "alike: CC BY-SA"})
# NonCommercial's ShareAlike is a separate family: neither license may be exchanged for the other.
_NC_SA = frozenset({"credit", "non-commercial", "alike: CC BY-NC-SA"})
_NC_ND = _NC | _ND
_PERMISSIVE = (
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "afl-3.0", "artistic-2.0", "bsl-1.0"),
    *("odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0", "etalab-2.0", "ms-pl", "ncsa"),
)
_CC = ("1.0", "2.0", "2.5", "3.0", "4.0")

OBLIGATIONS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("cc0-1.0", "pddl", "unlicense", "wtfpl", "0bsd"), frozenset()),
    **dict.fromkeys(_PERMISSIVE, _CREDIT),
    "cc": _CREDIT,
    **{f"cc-by-{version}": _CREDIT for version in _CC},
    **{f"cc-by-sa-{version}": _CC_SA for version in _CC},
    **{f"cc-by-nc-{version}": _NC for version in _CC},
    **{f"cc-by-nd-{version}": _ND for version in _CC},
    **{f"cc-by-nc-sa-{version}": _NC_SA for version in _CC},
    **{f"cc-by-nc-nd-{version}": _NC_ND for version in _CC},
    **{name: _CREDIT | {"alike: GPL"} for name in ("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-3.0")},
    **{name: _CREDIT | {f"alike: {name}"} for name in ("odbl", "gfdl", "mpl-2.0", "cdla-sharing-1.0", "eupl-1.2")},
}
"""Obligations of each license. The names are the Hub's, which are mostly lower-case SPDX names."""

ALIASES = {
    "apache": "apache-2.0",
    "apache2": "apache-2.0",
    "mit license": "mit",
    "cc0": "cc0-1.0",
    "public domain": "cc0-1.0",
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "pddl-1.0": "pddl",
    "none": UNKNOWN,
    "": UNKNOWN,
}


@dataclass(frozen=True)
class License:
    """The license on a card: the Hub's ``license`` (several if they have the same obligations), and the reason."""

    names: tuple[str, ...]
    """Hub names; ``("unknown",)`` and ``("other",)`` if no single license can be named."""
    reason: str
    """One sentence."""
    concerns: tuple[str, ...] = ()
    """Points to consider before passing the data on; empty where credit is the only obligation."""


def normalize_license(name: str | None) -> str:
    """Return a license's Hub name: ``CC BY-SA 3.0`` is ``cc-by-sa-3.0``, None is ``unknown``; others stay unchanged."""
    text = " ".join((name or "").strip().lower().split())
    text = ALIASES.get(text, text)
    if text in OBLIGATIONS or text in (UNKNOWN, OTHER):
        return text
    # Licenses are often written with blanks or underscores.
    dashed = text.replace(" ", "-").replace("_", "-")
    dashed = ALIASES.get(dashed, dashed)
    return dashed if dashed in OBLIGATIONS else text


def mixture_license(licenses: Iterable[str | None]) -> License:
    """Return the license of a dataset whose parts have ``licenses`` (None or empty where unknown)."""
    names = sorted({normalize_license(name) for name in licenses})
    known_names = [name for name in names if name in OBLIGATIONS]
    concerns = tuple(concern for name in names if (concern := _concern(name)))
    # One unknown license makes the mixture's unknown, however free the others are.
    if not names or UNKNOWN in names:
        return License(
            (UNKNOWN,), "The license of at least one source is not known, so neither is this dataset's.", concerns
        )
    if len(known_names) < len(names):
        unusual = ", ".join(name for name in names if name not in OBLIGATIONS)
        return License((OTHER,), f"{unusual}: not a license with known terms, so all sources' terms apply.", concerns)
    # A license that has all obligations of all parts can cover the mixture.
    obligations = frozenset[str]().union(*(OBLIGATIONS[name] for name in known_names))
    strictest = tuple(name for name in known_names if OBLIGATIONS[name] == obligations)
    if not strictest:
        text = ", ".join(known_names)
        return License(
            (OTHER,),
            f"No one of {text} has every obligation of the others, so all sources' terms apply.",
            (*concerns, "the sources' licenses do not fit under one of them"),
        )
    reason = "Every source has this license." if len(names) == 1 else "The strictest among the sources' licenses."
    return License(strictest, reason, concerns)


def _concern(name: str) -> str:
    """Return in a few words what may forbid passing on data of this license; empty when nothing does."""
    if name == UNKNOWN:
        return "a source's license is not known"
    if name not in OBLIGATIONS:
        return f"'{name}' is not a license with known terms"
    obligations = OBLIGATIONS[name]
    if "no derivatives" in obligations:
        return f"{name} forbids passing on changed versions, and a build is one"
    return f"{name} forbids commercial use" if "non-commercial" in obligations else ""
