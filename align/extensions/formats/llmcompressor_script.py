"""Quantize a model folder by GPTQ or AWQ: a program for an interpreter with llm-compressor, which has no align.

``PYTHON llmcompressor_script.py --version`` imports all that a job needs and prints llm-compressor's version.
``PYTHON llmcompressor_script.py JOB`` executes a job, a JSON file with the fields of
``align.extensions.formats.calibrated.Job``. Imports nothing of align.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

PATCHES = Path(__file__).parents[2] / "patches" / "llmcompressor.py"
"""A file and no module: this interpreter cannot import ``align``."""


def main(word: str) -> int:
    """Print the version, or execute the job in the file ``word``."""
    import datasets
    import llmcompressor
    import torch
    import transformers

    modifiers = {name: _modifiers(name) for name in ("gptq", "awq")}
    if word == "--version":
        sys.stdout.write(f"{llmcompressor.__version__}\n")
        return 0
    runpy.run_path(str(PATCHES))["skip_pinning"]()
    job = json.loads(Path(word).read_text(encoding="utf-8"))
    # Weights that are not quantized keep their type on disk.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), trust_remote_code=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]]
    llmcompressor.oneshot(
        model=model,
        processor=tokenizer,
        dataset=datasets.Dataset.from_list(rows),
        recipe=_recipe(job, modifiers[job["method"]]),
        max_seq_length=max(map(len, job["rows"])),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["output"], save_compressed=True)
    return 0


def _modifiers(method: str) -> list[Any]:
    """Return the classes of a method's modifiers; the last has the quantization's settings."""
    if method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier, QuantizationModifier]


def _recipe(job: dict[str, Any], modifiers: list[Any]) -> list[Any]:
    """Return the modifiers: 4-bit weights in groups, activations as they are."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": job["is_symmetric"],
        "strategy": "group",
        "group_size": job["group_size"],
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return [*(make() for make in modifiers[:-1]), modifiers[-1](config_groups=groups, ignore=job["ignore"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
