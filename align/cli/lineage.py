"""Lineage of a checkpoint by the records of its store: its inputs, its base, its scorecard. Has no heavy imports."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.checks.facts import check_base, has_base_digest, refuse
from align.cli.arguments import find_artifact
from align.cli.checkpoints import artifact_at, links_of, store_of
from align.errors import UserError, printable, with_article
from align.store.artifacts import GENERATORS, Artifact, Kind
from align.store.fingerprint import file_digest
from align.store.json_files import DamagedFile, parse_object
from align.store.record import RECORD, find_problems

BASE_FIELDS = ("model", "policy")
"""Input fields that name the checkpoint from which a training stage starts."""


def record_of(folder: Path) -> Artifact | None:
    """Return the finished artifact to which a checkpoint's ``model/`` or ``adapter/`` folder belongs, if any."""
    parent = folder.resolve().parent
    return artifact_at(parent) if (parent / RECORD).is_file() else None


def refuse_damage(folder: Path, *, thorough: bool) -> None:
    """Raise ``UserError`` if a checkpoint's folder belongs to an artifact whose files differ from its record.

    Only files whose time or size changed are hashed, unless ``thorough``: a flipped bit on a disk changes neither.
    """
    artifact = record_of(folder)
    if artifact is None:
        return
    for problem in find_problems(artifact, thorough):
        raise UserError(
            f"{problem.path} {problem.description}. The artifact is corrupted; "
            f"`--rebuild {artifact.stage}` in its pipeline runs it again."
        )


def lineage(artifact: Artifact) -> list[Artifact]:
    """Return the artifacts that an artifact was produced from, inputs first and itself last.

    An input that its store has deleted is omitted.
    """
    store = store_of(artifact)
    ancestors: dict[str, Artifact] = {}

    def add(descendant: Artifact) -> None:
        if descendant.key in ancestors:
            return
        for kind, key in links_of(descendant.record):
            source = store.find_intact(kind, key) if store is not None else None
            if source is not None:
                add(source)
        # An imported artifact has the key of its original, which was added first if the store still has it.
        ancestors.setdefault(descendant.key, descendant)

    add(artifact)
    return list(ancestors.values())


def pipeline_of(artifact: Artifact) -> dict[str, Any] | None:
    """Return the pipeline of the run that produced an artifact, or else of the last run that used it."""
    store = store_of(artifact)
    if store is None:
        return None
    key = artifact.record["key"]
    runs = [run for run in store.runs().values() if _uses(run, key)]
    producer = artifact.record.get("pipeline")
    # The run of the same name first, then the latest.
    best = max(runs, key=lambda run: (run.get("name") == producer, float(run.get("when", 0))), default=None)
    return None if best is None else best.get("pipeline")


def _uses(run: Mapping[str, Any], key: str) -> bool:
    return any(entry.get("key") == key for entry in run.get("stages", {}).values())


def find_scorecard(
    artifact: Artifact | None, word: str | None, store: str | None
) -> tuple[dict[str, Any], Artifact] | None:
    """Return a checkpoint's scorecard: ``word``'s scorecard, else the newest in its store; None without a scorecard.

    Raises ``UserError`` if ``word`` does not name a scorecard, or its scorecard did not measure this checkpoint.
    """
    if word is not None:
        return _named_scorecard(word, artifact, store)
    checkpoint_store = store_of(artifact) if artifact is not None else None
    if artifact is None or checkpoint_store is None:
        return None
    for evaluation in reversed(checkpoint_store.all()):
        if evaluation.kind != Kind.SCORECARD or not _may_have_read(evaluation, artifact):
            continue
        try:
            card = _read_scorecard(evaluation)
        except UserError as error:
            print(printable(f"note: an evaluation is left out: {error}"), file=sys.stderr)
            continue
        if artifact.key in _measured_keys(card):
            return card, evaluation
    return None


def _named_scorecard(word: str, artifact: Artifact | None, store: str | None) -> tuple[dict[str, Any], Artifact]:
    """Return the scorecard of ``--scorecard``; raise ``UserError`` if it did not measure the checkpoint."""
    evaluation = find_artifact(word, store)
    if evaluation.kind != Kind.SCORECARD:
        raise UserError(f"--scorecard {word} is {with_article(evaluation.kind)}, not a {Kind.SCORECARD}.")
    card = _read_scorecard(evaluation)
    if artifact is None or artifact.key not in _measured_keys(card):
        raise UserError(f"--scorecard {word}: it does not measure this checkpoint.")
    if not _may_have_read(evaluation, artifact):
        raise UserError(f"--scorecard {word}: it measured other weights of '{artifact.stage}', which was rerun since.")
    return card, evaluation


def _may_have_read(evaluation: Artifact, checkpoint: Artifact) -> bool:
    """Return whether an evaluation may have read these weights; a stage that was rerun may have others.

    An evaluation whose record names no weights may have read any.
    """
    # A key names settings; after a rebuild the same key may stand for other weights.
    recorded = {link["weights"] for link in evaluation.record["input_stages"] if link.get("weights")}
    return not recorded or checkpoint.weights in recorded


def _read_scorecard(artifact: Artifact) -> dict[str, Any]:
    path = artifact.path / "scorecard.json"
    remedy = f"`--rebuild {artifact.stage}` in its pipeline runs it again."
    for problem in find_problems(artifact, thorough=True):
        raise UserError(f"{problem.path} {problem.description}; {remedy}")
    try:
        return parse_object(path.read_bytes())
    except (OSError, DamagedFile) as error:
        raise UserError(f"{path}: cannot be read (it {error}); {remedy}") from None


def _measured_keys(card: dict[str, Any]) -> set[str]:
    """Return the keys of the checkpoints and reward models in a scorecard."""
    settings = card.get("settings") or {}
    rewards = (settings.get("reward_model"), settings.get("second_reward_model"))
    return {str(key) for key in [*(settings.get("checkpoints") or {}).values(), *rewards] if key}


def find_base(adapter: Path, recorded: str, chosen: Path | None) -> tuple[Path, str | None]:
    """Return the model folder that an adapter is merged into, and a note on checks that were not possible.

    ``recorded`` is the base in the adapter's config, ``chosen`` the base that the user names. If the adapter belongs to
    an artifact, its record has the key of the base, and the files must be that base's. Raises ``UserError`` for a
    missing base or a wrong base.
    """
    artifact = record_of(adapter)
    expected = _expected(artifact) if artifact is not None else None
    folder = chosen
    # A base chosen by the user comes first, then the base in the adapter's record, then the base in its config.
    if folder is None and expected is not None and expected[1] is not None:
        folder = expected[1].model
    if folder is None and (Path(recorded) / "config.json").is_file():
        folder = Path(recorded)
    if folder is None:
        raise UserError(f"{adapter}: its base, '{recorded}', is not here; name it with --base.")
    is_verified = has_base_digest(adapter)
    if expected is None:
        refuse("export", check_base(adapter, folder), waivable=False)
        note = f"no record says which base {adapter} was trained on; only its shapes show that it fits {folder}"
        return folder, None if is_verified else note
    key, original = expected
    _refuse_wrong_base(adapter, folder, key, original)
    refuse("export", check_base(adapter, folder), waivable=False)
    is_verified = is_verified or original is not None or record_of(folder) is not None
    note = f"the base of {adapter} is no longer in its store, so {folder} could not be compared with it"
    return folder, None if is_verified else note


def _expected(artifact: Artifact) -> tuple[str, Artifact | None] | None:
    """Return the key of the checkpoint that a training stage started from, and its artifact if the store has it."""
    inputs = artifact.record.get("inputs") or {}
    key = next((inputs[name] for name in BASE_FIELDS if isinstance(inputs.get(name), str)), None)
    if key is None:
        return None
    kind = next((link["kind"] for link in artifact.record["input_stages"] if link["key"] == key), "")
    store = store_of(artifact)
    base = store.find_intact(kind, key) if store is not None and kind else None
    return key, base if base is not None and base.kind in GENERATORS else None


def _refuse_wrong_base(adapter: Path, folder: Path, key: str, original: Artifact | None) -> None:
    """Raise ``UserError`` if ``folder`` is not the base with ``key``, by its record or its weights' digests."""
    artifact = record_of(folder)
    is_base = artifact is not None and key in (artifact.record["key"], artifact.key)
    reference = artifact if is_base else original
    if artifact is not None and reference is None:
        raise UserError(
            f"{folder} is {artifact.record['kind']}/{artifact.key[:12]}, and {adapter} was trained on {key[:12]}; name "
            "that one with --base."
        )
    outputs = reference.record["outputs"] if reference is not None else {}
    tensor_files = {name: entry for name, entry in outputs.items() if name.endswith(".safetensors")}
    weights = {
        name.removeprefix("model/"): entry["sha256"]
        for name, entry in tensor_files.items()
        if name.startswith("model/")
    }
    # The key may be gone from the store, but the same files are the same base.
    for name, sha256 in weights.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != sha256:
            problem = "is missing" if not path.is_file() else "has another sha256"
            raise UserError(
                f"{folder} is not the base that {adapter} was trained on, {key[:12]}: {name} {problem}. Name that one "
                "with --base."
            )
