"""The faults of a hand-over: name, what is wrong, what to do. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from align.errors import UserError

REMEDIES: dict[str, str] = {
    "weights-truncated": "Copy the files again, or have the stage that made them run again with --rebuild.",
    "weights-not-finite": "Train again with a lower learning rate, or from an earlier checkpoint; nothing can be "
    "learned from these.",
    "weights-dtype": "Take the checkpoint in float32, bfloat16 or float16, as its stage wrote it.",
    "vocabulary-size": "Take weights and tokenizer of one model; resize_token_embeddings gives added tokens rows.",
    "score-head": "Point at the output of a reward stage, and keep its files together.",
    "wrong-kind": "A policy writes (...ForCausalLM), a reward model scores (...ForSequenceClassification): point at "
    "the stage that makes what is wanted.",
    "adapter-base": "Name the base that the adapter was trained on.",
    "template-changed": "Put the chat template back, or give it to the `model` stage (`chat_template`) and train again "
    "from there, so that every checkpoint learns it.",
    "tokenizer-changed": "Put the tokenizer's files back, or take checkpoints that come from the same base model.",
    "pad-is-eos": "Bring the model in through a `model` stage, or set pad_token to another special token.",
    "eos-not-turn-end": "Bring the model in through a `model` stage, which takes the template's end of turn as eos.",
    "reward-floor": "Give the reward model more or cleaner pairs, or more held-out ones; `reward_floor: null` trains "
    "against it all the same.",
}
"""Every fault and its remedy."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a hand-over: ``place`` is a folder or a config field."""

    name: str
    place: str
    found: str

    def text(self) -> str:
        """One sentence with its remedy."""
        return f"{self.name}: {self.place} {self.found}. {REMEDIES[self.name]}"


def refuse(stage: str, faults: Iterable[Fault], waived: Iterable[str] = (), *, waivable: bool = True) -> None:
    """``UserError`` with every fault that is not ``waived`` by name; ``waivable`` says how that is done."""
    left = [fault for fault in faults if fault.name not in set(waived)]
    if not left:
        return
    names = ", ".join(dict.fromkeys(fault.name for fault in left))
    raise UserError(
        "\n".join([
            f"{stage}: what it is handed cannot be used.",
            *(f"  {fault.text()}" for fault in left),
            *([f"What is meant can be waived: `runtime: {{handover: {{waive: [{names}]}}}}`."] if waivable else []),
        ])
    )  # fmt: skip
