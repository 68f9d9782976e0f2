"""How much KL penalty does PPO want? Runs a pipeline once per ``kl_coef`` and compares the runs on one page.

All runs share every stage before PPO through the store, so only PPO and what follows is repeated. The page has the
settings against the results, score against KL with the best trade-offs marked, and the curves over each other; it is
what ``align compare NAME NAME ...`` writes, too:

    python examples/kl_sweep.py pipelines/quickstart.yaml 0.0 0.02 0.1
"""

import sys

from align import Pipeline
from align.report.compare.page import write_comparison


def main(path: str, coefficients: list[float]) -> None:
    """Run all, print what each came to, and write the page."""
    pipeline = Pipeline.load(path)
    runs = {}
    for kl_coef in coefficients:
        # a name of its own keeps each run's artifacts, and lets `align report` and `align compare` find it
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
