"""Work of both sides of ``ppo_vs_trl``, and the environment that trl's side runs in.

    python -m benchmarks.ppo_work SHAPE FOLDER   (called by ppo_vs_trl; SHAPE as JSON)

The work is one file, ``work.json``: the prompts of every update as token ids, and how many tokens each response to them
has. Beside it is the reward model: the embedded model with a random score head. Torch-free at import.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from align.errors import UserError

TRL = "1.12.0"
"""The last release with a PPO trainer."""
TRL_METHODS = {"full": "full", "lora": "lora", "lora_last": "lora"}
"""What trl runs beside each of align's methods."""
SAME = ("transformers", "peft", "accelerate")
"""Packages that trl's environment gets in the versions of this one."""
INVENTORY = """
import json
from importlib.metadata import PackageNotFoundError, version
versions = {}
for name in ("align", "trl", "llamafactory", "torch", "transformers", "peft", "accelerate", "datasets"):
    try:
        versions[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(versions))
"""


@dataclass(frozen=True)
class Shape:
    """Size of the work; ``updates`` counts the warm-up too."""

    batch: int = 32
    tokens: int = 64
    samples: int = 1
    micro_batch: int = 16
    instructions: int = 1
    lengths: str = "mixed"
    updates: int = 3
    seed: int = 0
    template: str = ""
    """Chat template by name; empty for the model's own, whose system message all prompts begin with."""


def load_work_tokenizer(model: Path, shape: Shape) -> Any:
    """Return the model's tokenizer, with the chat template of ``shape``."""
    from align.models.chat.named_templates import template_file
    from align.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    if shape.template:
        tokenizer.chat_template = template_file(shape.template, Path()).read_text(encoding="utf-8")
    return tokenizer


def response_lengths(shape: Shape) -> list[list[int]]:
    """Draw the tokens of each response of each update.

    ``full``: the most there may be. ``mixed``: anything from an eighth of that, evenly, and at least one that is full,
    as real responses that end by themselves or are cut off.
    """
    if shape.lengths == "full":
        return [[shape.tokens] * shape.batch for _ in range(shape.updates)]
    rng = random.Random(f"{shape.seed}:lengths")
    least = max(1, shape.tokens // 8)
    batches = [[rng.randint(least, shape.tokens) for _ in range(shape.batch)] for _ in range(shape.updates)]
    for lengths in batches:
        lengths[rng.randrange(shape.batch)] = shape.tokens
    return batches


def make_rows(shape: Shape) -> list[dict[str, Any]]:
    """One different prompt for each group of samples, of 1, 2, ... ``instructions`` instructions in turn."""
    from align.data.families.embedded import generate

    count = shape.batch // shape.samples * shape.updates
    sizes = [1 + index % shape.instructions for index in range(count)]
    texts = iter([row["prompt"][-1]["content"] for row in generate(sum(sizes), shape.seed)])
    contents = ["\n\n".join(next(texts) for _ in range(size)) for size in sizes]
    return [{"prompt": [{"role": "user", "content": content}]} for content in contents]


def prepare(shape: Shape, folder: Path) -> None:
    """Write ``work.json``, and the reward model if it is not there yet."""
    from align.models.built_in import fetch
    from align.rl.prompts import Prompts

    model = fetch()
    tokenizer = load_work_tokenizer(model, shape)
    rows = make_rows(shape)
    prompts, count = Prompts(rows, tokenizer, None), shape.batch // shape.samples
    batches = [
        [prompts.token_ids[i] for i in prompts.draw(update * count, count, shape.seed) for _ in range(shape.samples)]
        for update in range(shape.updates)
    ]  # the order in which align's trainer draws them
    reward = folder / "reward"
    if not reward.is_dir():
        save_reward(model, tokenizer, reward)
    work = {"shape": asdict(shape), "model": str(model), "reward": str(reward), "rows": rows, "prompts": batches}
    (folder / "work.json").write_text(json.dumps(work | {"lengths": response_lengths(shape)}), encoding="utf-8")


def save_reward(model: Path, tokenizer: Any, folder: Path) -> None:
    """The model with a score head drawn from N(0, 1/(d+1)), as a plain folder."""
    import torch
    from transformers import AutoModelForSequenceClassification

    reward = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    width = reward.score.in_features
    reward.score.weight.data.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
    reward.config.pad_token_id = tokenizer.pad_token_id
    reward.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_work(path: Path) -> dict[str, Any]:
    """The work, with its ``Shape``."""
    work: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return work | {"shape": Shape(**work["shape"])}


def environment(folder: Path) -> Path:
    """Return the Python of a virtual environment with trl 1.12, made or completed in ``folder`` if need be.

    Raises ``UserError`` for a folder that is something else, or holds another trl, and when pip fails.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not a virtual environment; name another folder with --environment.")
        print(f"making a virtual environment for trl {TRL} in {folder}")
        run_or_refuse([sys.executable, "-m", "venv", str(folder)])
    versions = inventory(python)
    if versions.get("trl", TRL) != TRL:
        raise UserError(f"{folder} has trl {versions['trl']}, and this needs {TRL}; name another with --environment.")
    if not {"trl", *SAME} <= set(versions):
        print(f"installing trl {TRL} and what it needs there")
        run_or_refuse([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements()])
    return python


def requirements() -> list[str]:
    """trl, and beside it what this environment has, so that both sides run on the same stack."""
    major, minor = version("torch").split(".")[:2]
    torch = f"torch>={major}.{minor},<{major}.{int(minor) + 1}"
    return [f"trl=={TRL}", *(f"{name}=={version(name)}" for name in SAME), torch]


def inventory(python: Path) -> dict[str, str]:
    """Return the versions of the packages that matter, in the environment of ``python``."""
    process = subprocess.run([str(python), "-c", INVENTORY], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(process.stdout)
    return versions


def run_or_refuse(command: list[str]) -> None:
    """Run a command that makes an environment; raises ``UserError`` with the end of its output where it fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{last_lines(process.stdout + process.stderr)}")


def last_lines(text: str, count: int = 20) -> str:
    """The end of a log."""
    return "\n".join(text.strip().splitlines()[-count:])


def process_environment() -> dict[str, str]:
    """Both sides' environment: all cores, no GPU, nothing from the network."""
    from align.pipeline.process_limits import usable_cores

    return {
        **os.environ,
        "OMP_NUM_THREADS": str(usable_cores()),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


if __name__ == "__main__":
    prepare(Shape(**json.loads(sys.argv[1])), Path(sys.argv[2]))
