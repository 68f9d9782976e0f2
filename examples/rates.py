"""Compare learning rates for tunings: short SFT runs of pipelines/methods.yaml, by held-out loss.

    python examples/rates.py sft lora_r4 --rates 2e-4 5e-4 1e-3 --rows 160

Every run is a stage in the store, so a second call runs only new combinations. Held-out loss is measured on the data's
test split, so this choice uses that split: compare methods on other prompts.
"""

from __future__ import annotations

import argparse

from align import Pipeline
from align.errors import StageFailed, UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", help="SFT stages of the pipeline")
    parser.add_argument("--pipeline", default="pipelines/methods.yaml")
    parser.add_argument("--rates", nargs="+", type=float, help="default: a third, once and three times the file's rate")
    parser.add_argument("--set", action="append", default=[], help="override a field of the pipeline, in every run")
    parser.add_argument("--rows", type=int, default=160, help="training rows of a run")
    parser.add_argument("--store", default=None)
    options = parser.parse_args()
    pipeline = Pipeline.load(options.pipeline).set(*options.set)
    for stage in options.stages:
        file_rate = float(pipeline.nodes[stage].config.learning_rate)  # type: ignore[attr-defined]
        losses = {}
        for rate in options.rates or (file_rate / 3, file_rate, file_rate * 3):
            losses[rate] = loss_at(pipeline, stage, rate, options.rows, options.store)
        best = min(losses, key=lambda rate: losses[rate])
        shown = "  ".join(f"{rate:.2g}: {loss:.3f}{' *' if rate == best else ''}" for rate, loss in losses.items())
        print(f"{stage:14} {shown}", flush=True)


def loss_at(pipeline: Pipeline, stage: str, rate: float, rows: int, store: str | None) -> float:
    """Return the held-out loss after training ``stage`` at ``rate``; infinity if training failed."""
    changed = pipeline.set(f"stages.{stage}.learning_rate", rate).set(f"stages.{stage}.max_rows", rows)
    for node in changed.nodes[stage].input_names:
        changed.run(only=node, store=store)
    try:
        return float(changed.run(only=stage, store=store).metrics(stage)["test_loss_after"])
    except (StageFailed, UserError) as error:
        print(f"{stage} at {rate:g}: {error}")
        return float("inf")


if __name__ == "__main__":
    main()
