"""PPO side by side: align's trainer and that of trl 1.12, the last release with one, on the same work.

    python -m benchmarks.ppo_vs_trl [--methods full lora lora_last] [--rounds 3] [--updates 2] [--json FILE]
    python -m benchmarks.ppo_vs_trl --curve [--curve-trl]    response lengths 64 to 512, batches 16 to 128

``full``: full fine-tuning with policy, reference, critic and reward model apart on both sides. ``lora``: align as
recommended (LoRA on the policy, its reference is the policy with the adapter off, the critic is an adapter on the
reward model's weights) against trl's LoRA (``peft_config``; its critic is a model of its own, trained in full).
``lora_last``: align with adapters in the last half of the layers (``last_layers``) against the same trl run. align
samples with vLLM where it is installed (``--engine transformers`` compares the rest), trl with ``generate()``.

Same on both sides: the embedded model in bf16, the prompts as token ids and their order, the micro-batch, one epoch,
one mini-batch, all cores, torch and transformers. Responses are sampled, but their lengths are forced, drawn once for
both: align's vLLM gets a token limit for each request and may not end earlier, trl's responses are cut after sampling,
which costs it nothing as it decodes to the last step anyway. ``--lengths full`` makes all of them as long as allowed,
which is kindest to trl: no padding behind a response.

trl's weights are bfloat16 (``--trl-weights``), where it is fastest: float32 ones it would sample from, and measure
values with, in float32. align's are float32 masters computing in bfloat16, always. Each run is a process of its own;
sides take turns, and so does who goes first. The first update of a run is not counted; in full fine-tuning the second
is slower than later ones too, while memory is touched for the first time (``--warm-up 2`` leaves it out). The floor
that the update phase is held against is in ``ppo_table.floor_flops``: 16 FLOPs per parameter and real token (6 + 6 for
the two that are trained, 2 + 2 for the frozen ones), with LoRA 12 (4 + 4, 2 + 2), with LoRA in the last half 9, over a
large bf16 product's rate.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.pipeline.process_limits import SPINNING
from align.runner.huge_pages import page_environment
from align.runner.worker import ENVIRONMENT
from benchmarks.ppo_table import Round, Run, efficiency, efficiency_lines, phases, table, tokens_line
from benchmarks.ppo_work import TRL, TRL_METHODS, Shape, environment, inventory, last_lines, process_environment

ROOT = Path(__file__).resolve().parents[1]
CURVE = [(32, 64), (32, 128), (32, 256), (32, 512), (16, 64), (64, 64), (128, 64)]
"""(batch, response tokens)."""
SIDES = {"align": "benchmarks.ppo_align", "trl": "benchmarks.ppo_trl"}


class RunFailed(RuntimeError):
    """A side's process ended without a result."""


def run_module(python: Path, module: str, arguments: list[str], log: Path, more: dict[str, str] | None = None) -> None:
    """Run one of the modules beside this one, with ``more`` in its environment.

    Raises ``RunFailed`` with the end of what it wrote.
    """
    with log.open("w", encoding="utf-8") as file:
        command = [str(python), "-m", module, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**process_environment(), **(more or {})}
        )
    if done.returncode:
        how = f"exit code {done.returncode}"
        if done.returncode < 0:
            how = signal.Signals(-done.returncode).name + " (out of memory?)" * (done.returncode == -signal.SIGKILL)
        raise RunFailed(f"{module} {' '.join(arguments[2:])}: {how}\n{last_lines(log.read_text(errors='replace'))}")


class Comparison:
    """Runs either side on prepared work in ``folder``."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.warm_up = options, folder, options.warm_up
        self.pythons = {"align": Path(sys.executable)}
        if not options.curve or options.curve_trl:
            self.pythons["trl"] = environment(options.environment)

    def prepare(self, shape: Shape) -> None:
        """Write the work of ``shape``."""
        arguments = [json.dumps(asdict(shape)), str(self.folder)]
        run_module(Path(sys.executable), "benchmarks.ppo_work", arguments, self.folder / "prepare.log")

    def run(self, side: str, method: str) -> Run:
        """Run one process of ``side`` on the work there is, and return what it measured."""
        out = self.folder / "result.json"
        arguments = [str(self.folder / "work.json"), str(out), "--method"]
        if side == "align":
            reuse = getattr(self.options, f"reuse_forward_{TRL_METHODS[method]}")
            arguments += [method, "--engine", self.options.engine, "--reuse-forward", str(reuse)]
        else:
            arguments += [TRL_METHODS[method]]
            arguments += ["--weights", self.options.trl_weights]
        print(f"  {method}: {side} ...", end="", flush=True)
        # As align's runner starts a stage; trl's side starts with the user's own environment.
        more = {**ENVIRONMENT, **page_environment(), **SPINNING} if side == "align" else {}
        run_module(self.pythons[side], SIDES[side], arguments, self.folder / f"{side}.log", more)
        result: Run = json.loads(out.read_text(encoding="utf-8"))
        out.unlink()
        result["warm_up"], result["updates"] = result["updates"][: self.warm_up], result["updates"][self.warm_up :]
        print(f" {phases(result)['seconds']:.1f} s an update, {result['peak_gib']:.1f} GiB")
        return result

    def rounds(self, method: str) -> list[Round]:
        """Return alternating runs of both sides."""
        rounds = []
        for index in range(self.options.rounds):
            order = list(SIDES) if index % 2 == 0 else list(reversed(SIDES))
            rounds.append({side: self.run(side, method) for side in order})
        return rounds


def compare(comparison: Comparison, shape: Shape) -> dict[str, Any]:
    """Run all methods at one shape, print a table each, and return everything measured."""
    comparison.prepare(shape)
    results: dict[str, Any] = {}
    for method in comparison.options.methods:
        rounds = comparison.rounds(method)
        print(f"\n{method}: {shape.batch} episodes of up to {shape.tokens} response tokens, lengths {shape.lengths}")
        print("\n".join([tokens_line(rounds), *table(rounds), *efficiency_lines(rounds, method), ""]))
        results[method] = {"rounds": rounds, "efficiency": efficiency(rounds, method)}
    return results


def curve(comparison: Comparison, shape: Shape) -> list[dict[str, Any]]:
    """One counted update at each point of ``CURVE``; a side that fails at one is told of, and left out there."""
    points = []
    for batch, tokens in CURVE:
        comparison.prepare(replace(shape, batch=batch, tokens=tokens, updates=comparison.warm_up + 1))
        for method in comparison.options.methods:
            runs: Round = {}
            for side in comparison.pythons:
                try:
                    runs[side] = comparison.run(side, method)
                except RunFailed as failure:
                    print(f" failed: {failure}")
            points.append({"method": method, "batch": batch, "tokens": tokens, "runs": runs})
    print("\n".join(curve_lines(points)))
    return points


def curve_lines(points: list[dict[str, Any]]) -> list[str]:
    """Return a line for each point: seconds an update, milliseconds a real token, peak memory, by side."""
    head = "".join(f"{side + ' s':>10}{'ms/token':>10}{'GiB':>7}" for side in SIDES)
    lines = [f"{'method':<8}{'batch':>6}{'tokens':>8}{head}"]
    for point in points:
        line = f"{point['method']:<8}{point['batch']:>6}{point['tokens']:>8}"
        for side in SIDES:
            if side in point["runs"]:
                medians = phases(point["runs"][side])
                line += f"{medians['seconds']:10.1f}{medians['per_token']:10.2f}{medians['peak_gib']:7.1f}"
            else:
                line += f"{'-':>10}{'-':>10}{'-':>7}"
        lines.append(line)
    return lines


def parse() -> argparse.Namespace:
    """Options, with their defaults."""
    from align.config.user_paths import cache_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=TRL_METHODS, default=["full", "lora", "lora_last"])
    add("--rounds", type=int, default=3, help="runs of each side and method")
    add("--updates", type=int, default=2, help="updates of a run that count")
    add("--warm-up", type=int, default=1, help="updates before them; the second one still pays for fresh memory")
    add("--batch", type=int, default=32, help="episodes an update")
    add("--tokens", type=int, default=64, help="response tokens at most")
    add("--lengths", choices=("mixed", "full"), default="mixed", help="of responses; mixed: from an eighth to the most")
    add("--samples", type=int, default=1, help="responses to a prompt")
    add("--instructions", type=int, default=1, help="prompts hold 1 to this many, for a wider mix of lengths")
    add("--template", default="", help="chat template by name; chatml: prompts share no system message")
    add("--micro-batch", type=int, default=16, help="episodes of a training pass, on both sides")
    add("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="what align samples with")
    add("--reuse-forward-full", type=float, default=0.0, help="share of measuring passes that align learns from")
    add("--reuse-forward-lora", type=float, default=1.0, help="the same with LoRA")
    add("--trl-weights", choices=("bfloat16", "float32"), default="bfloat16", help="type of trl's trained weights")
    add("--environment", type=Path, default=cache_folder() / f"trl-{TRL}", help="trl's virtual environment")
    add("--json", type=Path, help="write everything there")
    add("--curve", action="store_true", help="align over response lengths and batches, one update each")
    add("--curve-trl", action="store_true", help="trl too")
    return parser.parse_args()


def main() -> None:
    """Compare or draw the curve; exit code 2 for an environment that does not fit, 1 for a side that failed."""
    options = parse()
    shape = Shape(
        batch=options.batch,
        tokens=options.tokens,
        samples=options.samples,
        micro_batch=options.micro_batch,
        instructions=options.instructions,
        lengths=options.lengths,
        template=options.template,
        updates=options.warm_up + options.updates,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(options, Path(folder))
            results: Any = (curve if options.curve else compare)(comparison, shape)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except RunFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        sys.exit(1)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "environment")}
        packages = {side: inventory(python) for side, python in comparison.pythons.items()}
        about = {"shape": asdict(shape), "settings": settings, "packages": packages}
        options.json.write_text(json.dumps(about | {"found": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
