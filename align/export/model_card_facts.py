"""Inputs of a model card, and the Hub's metadata on it. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.config.hub_commits import HUB_NAME
from align.data.card import CARD, OTHER, License, mixture_license, normalize_license, read_recipe
from align.errors import UserError, printable
from align.models.built_in import NAME as EMBEDDED
from align.pipeline.registry import STAGES
from align.report.page.number_format import interval, number
from align.report.run.data_ledgers import MADE_HERE, license_rows
from align.store.artifacts import Artifact, Kind

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from align.export.export import Agreement, Written
    from align.export.fidelity import Fidelity

EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_FIELDS = ("model", "policy", "policies", "rewards")
"""Input fields that name the checkpoint, or the checkpoints, from which a stage starts."""
LICENSE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\- ]{0,60}")
LIBRARIES = {"gguf": "gguf", "lora": "peft"}
"""Format → the Hub's name of the library that loads it; transformers for the others."""
MOST_RESULTS = 60
"""Most results in the metadata; the table on the card has all."""


@dataclass(frozen=True)
class Facts:
    """Inputs of a model card."""

    name: str
    written: Written
    agreement: Agreement | None
    """None if the folder was not verified."""
    lineage: Sequence[Artifact] = ()
    """Every artifact behind the checkpoint, inputs first, itself last; empty without records."""
    pipeline: Mapping[str, Any] | None = None
    """The parsed pipeline file that produced it."""
    scorecard: Mapping[str, Any] | None = None
    scored_by: Artifact | None = None
    license: str | None = None
    """License as stated by the exporting user."""
    fidelity: Fidelity | None = None
    """Cost of a format with rounded weights; None for a transformers folder, or if it was not measured."""

    @property
    def artifact(self) -> Artifact | None:
        """The checkpoint's own artifact."""
        return self.lineage[-1] if self.lineage else None


def metadata(facts: Facts) -> ModelCardData:
    """Return the Hub's metadata."""
    from huggingface_hub import ModelCardData

    base = base_model(facts.lineage)
    license = license_of(facts.lineage, facts.license)
    trained = [artifact for artifact in facts.lineage if is_trained(artifact)]
    # Fields that exist only for some checkpoints.
    relation = "adapter" if facts.written.format == "lora" else "finetune"
    more: dict[str, Any] = {"base_model_relation": relation} if base and trained else {}
    if license.names == (OTHER,):
        more |= {"license_name": "terms-of-all-sources", "license_link": f"{CARD}#licenses"}
    results = eval_results(facts)
    tags = [str(artifact.record["kind"]) for artifact in trained if artifact.kind != Kind.REWARD]
    if facts.written.is_reward:
        tags = ["reward-model"]
    # The Hub accepts one name as text, and several as a list.
    names: Any = license.names[0] if len(license.names) == 1 else list(license.names)
    return ModelCardData(
        base_model=base,
        datasets=hub_datasets(facts.lineage) or None,
        license=names,
        library_name=LIBRARIES.get(facts.written.format, "transformers"),
        pipeline_tag="text-classification" if facts.written.is_reward else "text-generation",
        tags=["align", *dict.fromkeys(tags)],
        model_name=_line(facts.name) if results else None,
        eval_results=results or None,
        **more,
    )


def base_model(lineage: Sequence[Artifact]) -> str | None:
    """Return the Hub's name of the model from which the last artifact's weights come, if it has one."""
    for artifact in weight_history(lineage):
        if artifact.kind != Kind.MODEL:
            continue
        source = str((artifact.record.get("config") or {}).get("source", ""))
        if source == EMBEDDED:
            return EMBEDDED_ON_HUB
        if (artifact.record.get("config") or {}).get("revision") and HUB_NAME.fullmatch(source):
            return source
    return None


def card_verb(artifact: Artifact) -> str | None:
    """Return the verb for an artifact's stage (``Stage.card_verb``); None for a stage that makes no weights.

    The record has it, because a user's own stage may not be installed when its checkpoint is exported.
    """
    verb = artifact.record.get("card_verb")
    if isinstance(verb, str) and verb:
        return verb
    stage = STAGES.get(str(artifact.record.get("kind")))
    return None if stage is None else stage.card_verb


def is_trained(artifact: Artifact) -> bool:
    """Return whether an artifact has weights that were made here, unlike a base model's."""
    return card_verb(artifact) is not None and artifact.kind != Kind.MODEL


def weight_history(lineage: Sequence[Artifact]) -> list[Artifact]:
    """Return the artifacts from whose weights the last artifact's weights come, in order, the last included.

    They are linked by the inputs of ``BASE_FIELDS``. Reward models that scored and teachers are skipped.
    """
    by_key = {artifact.key: artifact for artifact in lineage}
    # An import is listed under the key of its original, and its readers name its own: both have the same weights.
    by_weights = {artifact.weights: artifact for artifact in lineage}
    reached: set[str] = set()
    # Walk back from the checkpoint itself, the last artifact of the lineage.
    waiting = list(lineage[-1:])
    while waiting:
        artifact = waiting.pop()
        if artifact.key in reached:
            continue
        reached.add(artifact.key)
        weights = {link["key"]: link.get("weights") for link in artifact.record.get("input_stages") or []}
        for key in _base_keys(artifact):
            source = by_key.get(key) or by_weights.get(str(weights.get(key)))
            if source is not None:
                waiting.append(source)
    ancestors = [artifact for artifact in lineage if artifact.key in reached]
    return [artifact for artifact in ancestors if card_verb(artifact) is not None]


def _base_keys(artifact: Artifact) -> list[str]:
    """Return the keys of the checkpoints from which an artifact's stage started."""
    keys: list[str] = []
    for name in BASE_FIELDS:
        value = (artifact.record.get("inputs") or {}).get(name) or []
        keys += value if isinstance(value, list) else [value]
    return keys


def hub_datasets(lineage: Sequence[Artifact]) -> list[str]:
    """Return the Hub's datasets in the recipes of its training data."""
    names = []
    for artifact in lineage:
        for source in read_recipe(artifact.path).get("sources") or []:
            name = str(source.get("dataset", "")) if isinstance(source, Mapping) else ""
            if HUB_NAME.fullmatch(name):
                names.append(name)
    return sorted(set(names))


def license_of(lineage: Sequence[Artifact], stated: str | None = None) -> License:
    """Return the checkpoint's license, from the licenses of its base and its data, or as ``stated``.

    Raises ``UserError`` for a statement that is not the name of a license.
    """
    names = [row["license"] for row in license_rows(lineage) if row["license"] != MADE_HERE]
    # The combined license of everything that the checkpoint was trained on or started from.
    mixture = mixture_license(names)
    if stated is None:
        if not names:
            return License(mixture.names, "Nothing is recorded of where this model comes from.", mixture.concerns)
        return mixture
    if not LICENSE_ID.fullmatch(stated):
        raise UserError(f"--license {stated!r} is no name of a license; the Hub's names look like apache-2.0.")
    return License((normalize_license(stated),), "Stated by who exported it.", mixture.concerns)


def own_names(facts: Facts) -> list[str]:
    """Return the checkpoint's names in the scorecard."""
    card = facts.scorecard
    artifact = facts.artifact
    if card is None or artifact is None:
        return []
    checkpoints = card.get("settings", {}).get("checkpoints") or {}
    names = [name for name, key in checkpoints.items() if key == artifact.key]
    return [name for name in names if name in card["estimates"]]


def reward_results(facts: Facts) -> list[Mapping[str, Any]]:
    """Return a reward model's results in the scorecard."""
    if facts.scorecard is None or facts.artifact is None:
        return []
    return [
        result for result in facts.scorecard.get("reward_models") or [] if result.get("stage") == facts.artifact.stage
    ]


REWARD_METRICS = {
    "as_labeled": "Pairs ordered as labeled",
    "true": "Pairs ordered as the true scores do",
    "longer": "Pairs that taking the longer answer gets right",
}


def eval_results(facts: Facts) -> list[EvalResult]:
    """Return the scorecard's estimates of this checkpoint for ``model-index``, with n and interval in their names."""
    card = facts.scorecard
    if card is None:
        return []
    if facts.written.is_reward:
        return _reward_eval_results(facts)
    results = []
    # A checkpoint may have several names in the scorecard; the metadata has the first.
    for system in own_names(facts)[:1]:
        for metric, estimate in card["estimates"][system].items():
            title = card["metrics"].get(metric, {}).get("title", metric)
            task = card["metrics"].get(metric, {}).get("task", "prompts")
            task_entry = (card.get("tasks") or {}).get(task) or {}
            settings = task_entry.get("settings") or {}
            dataset = settings.get("dataset")
            about = {
                "task_type": "text-generation",
                "dataset_type": str(dataset) if HUB_NAME.fullmatch(str(dataset or "")) else _slug(task),
                "dataset_name": _line(str(task_entry.get("title") or task)),
                "dataset_revision": settings.get("revision") if dataset else None,
                "metric_type": _slug(metric.rpartition(".")[2]),
            }
            results += _eval_result(title, estimate, about)
    return results[:MOST_RESULTS]


def _reward_eval_results(facts: Facts) -> list[EvalResult]:
    results = []
    for result in reward_results(facts):
        about = {
            "task_type": "text-classification",
            "dataset_type": _slug(result.get("task") or "pairs"),
            "dataset_name": _line(str(result.get("task") or "held-out pairs")),
            "metric_type": "accuracy",
        }
        for name, title in REWARD_METRICS.items():
            # Taking the longer answer is a baseline, no result of this model.
            if name != "longer" and result.get(name):
                results += _eval_result(title, result[name], about)
    return results


def _eval_result(title: str, estimate: Mapping[str, Any], about: Mapping[str, Any]) -> list[EvalResult]:
    """Return an estimate as a result of the Hub's metadata; none for a value that is not finite."""
    from huggingface_hub import EvalResult

    if estimate["value"] is None or not math.isfinite(estimate["value"]):
        return []
    ends = interval(estimate).replace("−", "-")
    name = f"{_line(title)} (n {number(estimate['n'])}, 95 % interval {ends})"
    arguments = {key: _value(estimate[key]) for key in ("n", "low", "high") if estimate.get(key) is not None}
    return [EvalResult(metric_name=name, metric_value=_value(estimate["value"]), metric_args=arguments, **about)]


def _value(value: float) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "task"


def _line(text: str) -> str:
    """Return one line without control characters: a name must not end the metadata."""
    return " ".join(printable(text).split())
