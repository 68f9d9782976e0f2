"""How much KL penalty does PPO want? Runs a pipeline once per ``kl_coef`` and tabulates score, gold score and KL.

All runs share every stage before PPO through the store, so only PPO and what follows is repeated:

    python examples/kl_sweep.py pipelines/quickstart.yaml 0.0 0.02 0.1
"""

import sys
from typing import Any

from align import Pipeline
from align.runner import Run


def row(kl_coef: float, run: Run) -> list[str]:
    """One line of the table: what the evaluation says of the PPO checkpoint."""
    metrics: dict[str, Any] = run.metrics("evaluate")
    values = metrics["values"]["ppo"]
    cells = [f"{kl_coef:g}", *(f"{values[name]:.3f}" if name in values else "-" for name in ("reward", "gold", "kl"))]
    for found in metrics["differences"]:
        if found["policy"] == "ppo" and found["metric"] == "gold":
            cells.append(
                f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] against {found['against']}"
            )
    return cells


def main(path: str, coefficients: list[float]) -> None:
    """Run and print a table."""
    pipeline = Pipeline.load(path)
    table = [["kl_coef", "RM score", "gold", "KL", "gold difference", ""]]
    for kl_coef in coefficients:
        name = f"{pipeline.name}-kl-{kl_coef:g}".replace(".", "_")
        variant = pipeline.set("stages.ppo.kl_coef", kl_coef).set("name", name)
        table.append((row(kl_coef, variant.run()) + [""] * 6)[:6])
        print("  ".join(table[-1]), flush=True)
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["pipelines/quickstart.yaml"]
    main(arguments[0], [float(text) for text in arguments[1:]] or [0.0, 0.05])
