"""How much KL penalty does PPO want? Runs a pipeline once per ``kl_coef`` and tabulates score, gold score and KL.

All runs share every stage before PPO through the store, so only PPO and what follows is repeated:

    python examples/kl_sweep.py pipelines/quickstart.yaml 0.0 0.02 0.1
"""

import sys
from typing import Any

from align import Pipeline
from align.runner import Run


def row(kl_coef: float, run: Run) -> list[str]:
    """One line of the table: what the scorecard says of the PPO checkpoint."""
    metrics: dict[str, Any] = run.metrics("evaluate")["policies"]["ppo"]
    cells = [f"{kl_coef:g}"]
    for name in ("score", "gold", "kl", "length"):
        found = metrics.get(name)
        cells.append("-" if found is None else f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
    return cells


def main(path: str, coefficients: list[float]) -> None:
    """Run and print a table."""
    pipeline = Pipeline.load(path)
    table = [["kl_coef", "RM score", "gold score", "KL to reference", "length"]]
    for kl_coef in coefficients:
        variant = pipeline.set("stages.ppo.kl_coef", kl_coef).set(
            "name", f"{pipeline.name}-kl-{kl_coef:g}".replace(".", "_")
        )
        table.append(row(kl_coef, variant.run()))
        print("  ".join(table[-1]), flush=True)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "pipelines/quickstart.yaml",
        [float(x) for x in sys.argv[2:]] or [0.0, 0.05],
    )
