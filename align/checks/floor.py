"""Whether a reward model is good enough to learn from: its held-out accuracy, with its interval, against a floor.

A policy follows whatever a reward model says, and says nothing when that is noise. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.checks.facts import read_facts
from align.checks.faults import Fault
from align.evaluation.statistics import wilson
from align.store.artifacts import Artifact, Kind

DEFAULT = 0.5
"""Of a coin. How good an accuracy can be depends on how far the labels agree; better than chance is the least."""


def below_floor(config: Any, given: list[tuple[str, Artifact]], warn: Callable[[str], None]) -> list[Fault]:
    """Reward models whose 95 % interval (Wilson) on held-out pairs does not lie above ``config.reward_floor``.

    A config without that field trains against no reward model. One whose accuracy nobody wrote down is warned of.
    """
    floor = getattr(config, "reward_floor", None)
    if floor is None:
        return []
    faults = []
    for field, artifact in given:
        if artifact.kind != Kind.REWARD:
            continue
        facts = read_facts(artifact.model)
        if facts is None or facts.accuracy is None or not facts.pairs:
            warn(
                f"reward_floor is {floor:g}, and no accuracy of '{artifact.stage}' on held-out pairs is written down; "
                "an evaluate stage with `pairs` measures it."
            )
            continue
        estimate = wilson(facts.accuracy * facts.pairs, facts.pairs)
        if estimate.low <= floor:
            what = (
                f"('{artifact.stage}') orders {facts.accuracy:.3f} of {facts.pairs} held-out pairs as labeled, "
                f"interval [{estimate.low:.3f}, {estimate.high:.3f}], which is not above reward_floor {floor:g}"
            )
            faults.append(Fault("reward-floor", field, what))
    return faults
