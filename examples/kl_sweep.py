"""Run a pipeline once per ``kl_coef`` and compare PPO's score against its KL on one page.

All runs share every stage before PPO through the store, so only PPO and later stages are repeated. The page shows the
settings against the results, score against KL with the best trade-offs marked, and the curves on top of each other.
``align compare NAME NAME ...`` writes the same page.

    python examples/kl_sweep.py pipelines/quickstart.yaml 0.0 0.02 0.1
"""

import sys

from align import Pipeline
from align.report.compare.comparison import write_comparison


def main(path: str, coefficients: list[float]) -> None:
    """Run each coefficient, print its scores, and write the comparison page."""
    pipeline = Pipeline.load(path)
    runs = {}
    for kl_coef in coefficients:
        # A separate name protects each run's artifacts from `align gc` and lets `align report` find the run.
        name = f"{pipeline.name}-kl-{kl_coef:g}".replace(".", "_")
        runs[name] = pipeline.set("stages.ppo.kl_coef", kl_coef).set("name", name).run()
        values = runs[name].metrics("evaluate")["values"]["ppo"]
        print(name, *(f"{metric} {values[metric]:.3f}" for metric in ("reward", "gold", "kl") if metric in values))
    page = runs[name].store.root / "reports" / "kl_sweep" / "compare.html"
    write_comparison({name: run.artifacts for name, run in runs.items()}, page, title="PPO by KL penalty")
    print(f"Comparison: {page.resolve()}")


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["pipelines/quickstart.yaml"]
    main(arguments[0], [float(text) for text in arguments[1:]] or [0.0, 0.05])
