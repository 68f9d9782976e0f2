"""What a checkpoint was made from, and what measured it, by the records of a store. Imports nothing heavy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from align.checks.adapters import check_base, has_base
from align.checks.faults import refuse
from align.cli.arguments import find_artifact
from align.cli.checkpoints import artifact_at
from align.cli.console import printable
from align.errors import UserError
from align.store.artifacts import GENERATORS, Artifact, Kind
from align.store.fingerprint import file_digest
from align.store.json_files import DamagedFile, parse_object
from align.store.marker import MARKER
from align.store.output_files import differing
from align.store.record import RECORD
from align.store.store import Store

BASE_FIELDS = ("model", "policy")
"""Input fields that name the checkpoint which a training stage starts from."""


def record_of(folder: Path) -> Artifact | None:
    """The finished artifact that a checkpoint's ``model/`` or ``adapter/`` folder belongs to, if any."""
    inside = folder.resolve().parent
    return artifact_at(inside) if (inside / RECORD).is_file() else None


def refuse_damage(folder: Path, *, thorough: bool) -> None:
    """Raise ``UserError`` where a checkpoint's folder belongs to an artifact whose files differ from its record.

    Only files whose time or size changed are hashed, unless ``thorough``: a flipped bit on a disk changes neither.
    """
    artifact = record_of(folder)
    if artifact is None:
        return
    for problem in differing(artifact, thorough):
        raise UserError(
            f"{problem.path} {problem.what}. The artifact is corrupted; `--rebuild {artifact.stage}` in its pipeline "
            "makes it again."
        )


def store_of(artifact: Artifact) -> Store | None:
    """The store that an artifact lies in."""
    root = artifact.path.resolve().parents[1]
    return Store(root) if (root / MARKER).is_file() else None


def lineage(artifact: Artifact) -> list[Artifact]:
    """Every artifact that it was made from, inputs first, itself last, as far as its store still has them."""
    store = store_of(artifact)
    found: dict[str, Artifact] = {}

    def add(one: Artifact) -> None:
        if one.key in found:
            return
        for kind, key in _links(one.record):
            before = store.find_intact(kind, key) if store is not None else None
            if before is not None:
                add(before)
        # what was only taken from elsewhere is its original, where that is still here
        found.setdefault(one.key, one)

    add(artifact)
    return list(found.values())


def _links(record: dict[str, Any]) -> list[tuple[str, str]]:
    links = [(str(link["kind"]), str(link["key"])) for link in record["input_stages"]]
    metrics = record.get("metrics") or {}
    if record.get("kind") == "artifact" and metrics.get("key"):
        links.append((str(metrics.get("kind")), str(metrics["key"])))
    return links


def pipeline_of(artifact: Artifact) -> dict[str, Any] | None:
    """The pipeline file of the last run that reached an artifact, as it was read."""
    store = store_of(artifact)
    runs = store.runs().values() if store is not None else []
    reaching = [
        run
        for run in runs
        if any(entry.get("key") == artifact.record["key"] for entry in run.get("stages", {}).values())
    ]
    made_by = artifact.record.get("pipeline")
    best = max(reaching, key=lambda run: (run.get("name") == made_by, float(run.get("when", 0))), default=None)
    return None if best is None else best.get("pipeline")


def find_scorecard(
    artifact: Artifact | None, word: str | None, store: str | None
) -> tuple[dict[str, Any], Artifact] | None:
    """The scorecard that ``word`` names, else the newest in the checkpoint's store that measures it; None for none.

    Raises ``UserError`` for a ``word`` that is no scorecard, or one in which this checkpoint does not occur.
    """
    if word is not None:
        named = find_artifact(word, store)
        if named.kind != Kind.SCORECARD:
            raise UserError(f"--scorecard {word} is a {named.kind}, not a {Kind.SCORECARD}.")
        card = _read(named)
        if artifact is None or artifact.key not in _measured(card):
            raise UserError(f"--scorecard {word}: this checkpoint is not among those it measures.")
        if not _read_these_weights(named, artifact):
            raise UserError(
                f"--scorecard {word}: it measured other weights of '{artifact.stage}', which was made again."
            )
        return card, named
    own = store_of(artifact) if artifact is not None else None
    if artifact is None or own is None:
        return None
    for evaluation in reversed(own.all()):
        if evaluation.kind != Kind.SCORECARD or not _read_these_weights(evaluation, artifact):
            continue
        try:
            card = _read(evaluation)
        except UserError as error:
            print(printable(f"note: an evaluation is left out: {error}"), file=sys.stderr)
            continue
        if artifact.key in _measured(card):
            return card, evaluation
    return None


def _read_these_weights(evaluation: Artifact, checkpoint: Artifact) -> bool:
    """Whether an evaluation may have read this making of the checkpoint; a stage made anew may have other weights."""
    recorded = {link["weights"] for link in evaluation.record["input_stages"] if link.get("weights")}
    return not recorded or checkpoint.weights in recorded


def _read(artifact: Artifact) -> dict[str, Any]:
    path = artifact.path / "scorecard.json"
    remedy = f"`--rebuild {artifact.stage}` in its pipeline makes it again."
    for problem in differing(artifact, thorough=True):
        raise UserError(f"{problem.path} {problem.what}; {remedy}")
    try:
        return parse_object(path.read_bytes())
    except (OSError, DamagedFile) as error:
        raise UserError(f"{path}: cannot be read (it {error}); {remedy}") from None


def _measured(card: dict[str, Any]) -> set[str]:
    """Keys of the checkpoints and reward models in a scorecard."""
    settings = card.get("settings") or {}
    rewards = (settings.get("reward_model"), settings.get("second_reward_model"))
    return {str(key) for key in [*(settings.get("checkpoints") or {}).values(), *rewards] if key}


def find_base(adapter: Path, recorded: str, given: Path | None) -> tuple[Path, str | None]:
    """The model folder that an adapter is merged onto, and what could not be checked about it.

    ``recorded`` is what the adapter's config names, ``given`` what the user does. Where the adapter is part of an
    artifact, its record names the base by its key, and the files must be that one's. Raises ``UserError`` for a base
    that is not here or is another one.
    """
    artifact = record_of(adapter)
    expected = _expected(artifact) if artifact is not None else None
    folder = given
    if folder is None and expected is not None and expected[1] is not None:
        folder = expected[1].model
    if folder is None and (Path(recorded) / "config.json").is_file():
        folder = Path(recorded)
    if folder is None:
        raise UserError(f"{adapter}: its base, '{recorded}', is not here; name it with --base.")
    known = has_base(adapter)
    if expected is None:
        refuse("export", check_base(adapter, folder), waivable=False)
        return (
            folder,
            None
            if known
            else f"nothing records which base {adapter} was trained on; it fits {folder} by its shapes alone",
        )
    key, original = expected
    _refuse_other_base(adapter, folder, key, original)
    refuse("export", check_base(adapter, folder), waivable=False)
    known = known or original is not None or record_of(folder) is not None
    return folder, None if known else f"the base of {adapter} is gone from its store, so {folder} cannot be compared"


def _expected(artifact: Artifact) -> tuple[str, Artifact | None] | None:
    """Key of the checkpoint that a training stage started from, and the artifact while its store has it."""
    inputs = artifact.record.get("inputs") or {}
    key = next((inputs[name] for name in BASE_FIELDS if isinstance(inputs.get(name), str)), None)
    if key is None:
        return None
    kind = next((link["kind"] for link in artifact.record["input_stages"] if link["key"] == key), "")
    store = store_of(artifact)
    found = store.find_intact(kind, key) if store is not None and kind else None
    return key, found if found is not None and found.kind in GENERATORS else None


def _refuse_other_base(adapter: Path, folder: Path, key: str, original: Artifact | None) -> None:
    own = record_of(folder)
    reference = own if own is not None and key in (own.record["key"], own.key) else original
    if own is not None and reference is None:
        raise UserError(
            f"{folder} is {own.record['kind']}/{own.key[:12]}, and {adapter} was trained on {key[:12]}; name that one "
            "with --base."
        )
    outputs = reference.record["outputs"] if reference is not None else {}
    weights = {
        name.partition("/")[2]: entry["sha256"]
        for name, entry in outputs.items()
        if name.startswith("model/") and name.endswith(".safetensors")
    }
    for name, sha256 in weights.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != sha256:
            found = "is missing" if not path.is_file() else "has another sha256"
            raise UserError(
                f"{folder} is not the base that {adapter} was trained on, {key[:12]}: {name} {found}. Name that one "
                "with --base."
            )
