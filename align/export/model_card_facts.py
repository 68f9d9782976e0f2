"""What a model card is written from, and the Hub's metadata on it. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.data.card import CARD, recipe_of
from align.data.licenses import OTHER, License, normalize, of_mixture
from align.errors import UserError, printable
from align.models.embedded import NAME as EMBEDDED
from align.models.source import HUB_NAME
from align.report.assets import Beside
from align.report.ledgers import MADE_HERE, license_rows
from align.report.wording import interval, number
from align.store.artifacts import Artifact, Kind

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from align.export.export import Written
    from align.export.verify import Agreement

EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAINING = (
    "sft",
    "reward",
    "dpo",
    "kto",
    "orpo",
    "cpo",
    "simpo",
    "distill",
    "ppo",
    "grpo",
    "rloo",
    "online_dpo",
    "rejection",
)
LICENSE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\- ]{0,60}")
MOST_RESULTS = 60
"""In the metadata; the table on the card has all."""


@dataclass(frozen=True)
class Facts:
    """What a card is written from."""

    name: str
    written: Written
    agreement: Agreement | None
    """None where the folder was not checked."""
    lineage: Sequence[Artifact] = ()
    """Every artifact that the checkpoint was made from, inputs first, itself last; empty where nothing is recorded."""
    pipeline: Mapping[str, Any] | None = None
    """The pipeline file that made it, as it was read."""
    scorecard: Mapping[str, Any] | None = None
    scored_by: Artifact | None = None
    license: str | None = None
    """As stated by who exports."""
    licenses: list[dict[str, Any]] = field(default_factory=list)

    @property
    def artifact(self) -> Artifact | None:
        """The checkpoint's own."""
        return self.lineage[-1] if self.lineage else None


def metadata(facts: Facts) -> ModelCardData:
    """The Hub's metadata."""
    from huggingface_hub import ModelCardData

    base, license = base_model(facts.lineage), license_of(facts.lineage, facts.license)
    trained = [one.record.get("kind") for one in facts.lineage if one.record.get("kind") in TRAINING]
    more: dict[str, Any] = {"base_model_relation": "finetune"} if base and trained else {}
    if license.names == (OTHER,):
        more |= {"license_name": "terms-of-all-sources", "license_link": f"{CARD}#licenses"}
    results = eval_results(facts)
    tags = ["reward-model"] if facts.written.is_reward else [str(kind) for kind in trained if kind != "reward"]
    names: Any = license.names[0] if len(license.names) == 1 else list(license.names)
    return ModelCardData(
        base_model=base,
        datasets=hub_datasets(facts.lineage) or None,
        license=names,
        library_name="transformers",
        pipeline_tag="text-classification" if facts.written.is_reward else "text-generation",
        tags=["align", *dict.fromkeys(tags)],
        model_name=_line(facts.name) if results else None,
        eval_results=results or None,
        **more,
    )


def base_model(lineage: Sequence[Artifact]) -> str | None:
    """The Hub's name of the model that it all began with, where it has one."""
    for artifact in lineage:
        if artifact.kind != Kind.MODEL:
            continue
        source = str((artifact.record.get("config") or {}).get("source", ""))
        if source == EMBEDDED:
            return EMBEDDED_ON_HUB
        if (artifact.record.get("config") or {}).get("revision") and HUB_NAME.fullmatch(source):
            return source
    return None


def hub_datasets(lineage: Sequence[Artifact]) -> list[str]:
    """Datasets of the Hub among the recipes that made its training data."""
    found = []
    for artifact in lineage:
        for source in recipe_of(artifact.path).get("sources") or []:
            name = str(source.get("dataset", "")) if isinstance(source, Mapping) else ""
            if HUB_NAME.fullmatch(name):
                found.append(name)
    return sorted(set(found))


def license_of(lineage: Sequence[Artifact], stated: str | None = None) -> License:
    """What the checkpoint may be passed on under, from the licenses of its base and its data, or as ``stated``.

    Raises ``UserError`` for a statement that is no license's name.
    """
    names = [row["license"] for row in license_rows(lineage, Beside()) if row["license"] != MADE_HERE]
    whole = of_mixture(names)
    if stated is None:
        if not names:
            return License(whole.names, "Nothing is recorded of where this model comes from.", whole.concerns)
        return whole
    if not LICENSE_ID.fullmatch(stated):
        raise UserError(f"--license {stated!r} is no name of a license; the Hub's names look like apache-2.0.")
    return License((normalize(stated),), "Stated by who exported it.", whole.concerns)


def own_names(facts: Facts) -> list[str]:
    """What the checkpoint is called in the scorecard."""
    card, artifact = facts.scorecard, facts.artifact
    if card is None or artifact is None:
        return []
    checkpoints = card.get("settings", {}).get("checkpoints") or {}
    return [name for name, key in checkpoints.items() if key == artifact.key and name in card["estimates"]]


def reward_results(facts: Facts) -> list[Mapping[str, Any]]:
    """A reward model's measurements in the scorecard."""
    if facts.scorecard is None or facts.artifact is None:
        return []
    return [one for one in facts.scorecard.get("reward_models") or [] if one.get("stage") == facts.artifact.stage]


REWARD_METRICS = {
    "as_labeled": "Pairs ordered as labeled",
    "true": "Pairs ordered as the true scores do",
    "longer": "Pairs that taking the longer answer gets right",
}


def eval_results(facts: Facts) -> list[EvalResult]:
    """The scorecard's estimates of this checkpoint for ``model-index``, each with its n and interval in words."""
    from huggingface_hub import EvalResult

    card = facts.scorecard
    if card is None:
        return []
    if facts.written.is_reward:
        return [
            EvalResult(
                task_type="text-classification", dataset_type=_slug(one.get("task") or "pairs"),
                dataset_name=_line(str(one.get("task") or "held-out pairs")), metric_type="accuracy",
                metric_name=_measured(title, one[name]), metric_value=_value(one[name]["value"]),
                metric_args=_arguments(one[name]),
            )
            for one in reward_results(facts) for name, title in REWARD_METRICS.items()
            if name != "longer" and one.get(name) and one[name]["value"] is not None
        ]  # fmt: skip
    found = []
    for system in own_names(facts)[:1]:
        for metric, estimate in card["estimates"][system].items():
            if estimate["value"] is None or not math.isfinite(estimate["value"]):
                continue
            title = card["metrics"].get(metric, {}).get("title", metric)
            task = card["metrics"].get(metric, {}).get("task", "prompts")
            about = (card.get("tasks") or {}).get(task) or {}
            settings = about.get("settings") or {}
            dataset = settings.get("dataset")
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=str(dataset) if HUB_NAME.fullmatch(str(dataset or "")) else _slug(task),
                    dataset_name=_line(str(about.get("title") or task)),
                    dataset_revision=settings.get("revision") if dataset else None,
                    metric_type=_slug(metric.rpartition(".")[2]),
                    metric_name=_measured(title, estimate),
                    metric_value=_value(estimate["value"]),
                    metric_args=_arguments(estimate),
                )
            )
    return found[:MOST_RESULTS]


def _measured(title: str, estimate: Mapping[str, Any]) -> str:
    ends = interval(dict(estimate)).replace("−", "-")
    return f"{_line(title)} (n {number(estimate['n'])}, 95 % interval {ends})"


def _arguments(estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value(estimate[name]) for name in ("n", "low", "high") if estimate.get(name) is not None}


def _value(value: float) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "task"


def _line(text: str) -> str:
    """On one line, without control characters: a name must not end the metadata."""
    return " ".join(printable(text).split())
