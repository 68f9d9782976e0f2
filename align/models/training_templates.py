"""Training templates: chat templates under which a conversation's beginning never changes as it goes on. Torch-free.

Episodes append to what was sampled, so turn n must be a prefix of turn n+1. Some published templates drop thoughts of
earlier turns, move tools to the last question, or close the last answer with another token. A file below
``templates/training/`` writes the same prompts and keeps every earlier turn. Left out: whether a template fits a
model's own, which whoever takes it checks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from align.models.named_templates import FOLDER

TRAINING = FOLDER / "training"


@dataclass(frozen=True)
class TrainingTemplate:
    """A family of templates, known by texts that its published ones have."""

    marks: tuple[str, ...]
    """Texts that the model's own template has, all of them."""
    tokens: tuple[str, ...]
    """Special tokens that the training template writes, beside bos and eos."""


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TRAINING_TEMPLATES: dict[str, TrainingTemplate] = {
    "smollm3": TrainingTemplate(("Reasoning Mode: ",), CHATML),
    "smollm2": TrainingTemplate(("named SmolLM, trained by Hugging Face<|im_end|>",), CHATML),
    "olmo3": TrainingTemplate(("<functions>", "<|im_start|>"), CHATML),
    "qwen2.5": TrainingTemplate(("You are Qwen, created by Alibaba Cloud.",), CHATML),
    "qwen3": TrainingTemplate(("<tool_call>", "<tool_response>", "<|im_start|>"), CHATML),
    "llama3.1": TrainingTemplate(("Cutting Knowledge Date: ", "<|start_header_id|>"), LLAMA3),
    "llama3": TrainingTemplate(("<|start_header_id|>",), LLAMA3),
    "mistral": TrainingTemplate(("[INST]", "[TOOL_CALLS]"), ("[INST]", "[/INST]")),
    "chatml": TrainingTemplate(("<|im_start|>",), CHATML),
}
"""Training templates by name, those of a narrower family first."""


def training_templates(template: str, vocabulary: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of the training templates of a template's family whose tokens are in the vocabulary."""
    for name, training in TRAINING_TEMPLATES.items():
        if all(mark in template for mark in training.marks) and all(token in vocabulary for token in training.tokens):
            yield name, read_training_template(name)


def read_training_template(name: str) -> str:
    """Return the text of a training template."""
    return (TRAINING / f"{name}.jinja").read_text(encoding="utf-8")
