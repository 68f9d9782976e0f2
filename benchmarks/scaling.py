"""The tables of docs/scaling.md: how time, memory and traffic grow from 1 to 512 devices, by the plan's own model.

    python -m benchmarks.scaling            # print them
    python -m benchmarks.scaling --write    # put them into the page

Nothing is measured here: these are the numbers that ``align plan --hardware`` gives. Torch is not needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.capacity.hardware import DEVICES, GIB, Hardware
from align.capacity.job import Job
from align.capacity.training_ways import training_ways
from align.capacity.ways import Way
from align.config.runtime import Runtime
from align.models.architecture import Architecture, architecture_of
from align.pipeline.registry import find_stage
from benchmarks.stage_work import plan_job

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- written by python -m benchmarks.scaling --write -->", "<!-- end of what is written -->"
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CARD, PER_NODE = "h100", 8
ROWS, LENGTH = 512, 4096


def _llama(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Architecture:
    """Sizes of Llama 3.1 and 3.2, as in their ``config.json``."""
    return architecture_of(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": tied,
        }
    )  # fmt: skip


MODELS = {
    "1B": _llama(2048, 8192, 16, 32, True),
    "8B": _llama(4096, 14336, 32, 32, False),
    "70B": _llama(8192, 28672, 80, 64, False),
}


def sft_job(model: Architecture) -> Job:
    """One step of full fine-tuning on 2 million tokens."""
    fields = {"model": "m", "data": "d", "learning_rate": 1e-5, "batch_size": ROWS, "micro_batch_size": 8}
    return _job("sft", {"model": [model]}, fields | {"max_length": LENGTH, "max_steps": 1})


def ppo_job(model: Architecture) -> Job:
    """One PPO update of 512 responses of 512 tokens, policy and critic trained in full, the engine in process."""
    fields = {
        "policy": "p", "prompts": "d", "reward": "r", "learning_rate": 1e-6, "rollout_batch": ROWS, "updates": 1,
        "samples_per_prompt": 1, "micro_batch_size": 8, "max_prompt_tokens": 512, "max_tokens": 512,
    }  # fmt: skip
    return _job("ppo", {"policy": [model], "reward": [model]}, fields)


def _job(kind: str, models: dict[str, list[Architecture]], fields: dict[str, Any]) -> Job:
    runtime = Runtime.model_validate({"device": "cuda", "engine": {"name": "vllm"}})
    return plan_job(kind, find_stage(kind).config_class().model_validate(fields), models, runtime)


def hardware_of(devices: int) -> Hardware:
    """Machines of eight."""
    nodes = max(1, devices // PER_NODE)
    return Hardware(DEVICES[CARD], nodes, devices // nodes)


def table(jobs: dict[str, Job]) -> list[str]:
    """One row for each size and number of devices, by the cheapest way that fits."""
    head = [
        "model",
        "GPUs",
        "strategy",
        "micro-batch",
        "GiB",
        "s/step",
        "tokens/s",
        "per GPU",
        "GiB sent",
    ]
    head += ["exchange s", "$/M tokens"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, job in jobs.items():
        base: float | None = None
        for count in COUNTS:
            hardware = hardware_of(count)
            best = training_ways(job, hardware, ROWS, 1.0)[0]
            cells, base = _cells(best, hardware, base)
            lines.append(f"| {' | '.join([name, str(count), *cells])} |")
    return lines


def _cells(best: Way, hardware: Hardware, base: float | None) -> tuple[list[str], float | None]:
    """``base`` is what the first number of devices that fits does for each of them, in tokens a second."""
    if best.time is None:
        return ["does not fit", *["-"] * 8], base
    time, count = best.time, hardware.devices
    each = time.tokens / time.seconds / count
    base = each if base is None else base
    price = (hardware.device.price or 0.0) * count * time.seconds / 3600 / time.tokens * 1e6
    return [
        best.label,
        str(best.batch),
        f"{best.peak / GIB:.0f}",
        f"{time.seconds:.3g}",
        f"{count * each:,.0f}",
        f"{each / base:.0%}".replace("%", " %"),
        f"{time.sent / GIB:.1f}",
        f"{time.exchanging:.2g}",
        f"{price:.3f}",
    ], base


def written() -> str:
    """Return the text between the page's two marks."""
    sft = {name: sft_job(model) for name, model in MODELS.items()}
    ppo = {name: ppo_job(model) for name, model in MODELS.items()}
    return "\n".join(
        [
            BEGIN,
            "",
            f"### Full fine-tuning: a step of {ROWS} rows of {LENGTH:,} tokens",
            "",
            *table(sft),
            "",
            f"### PPO: an update of {ROWS} responses of 512 tokens to prompts of 512; models of equal size",
            "",
            *table(ppo),
            "",
            END,
        ]
    )


def page(text: str) -> str:
    """``text``, a page with the two marks, with what stands between them made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + written() + after


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(written())


if __name__ == "__main__":
    main()
