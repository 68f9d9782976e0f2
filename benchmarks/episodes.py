"""Episodes side by side: align's GRPO trainer and that of trl 1.16 in an environment with a tool, on the same work.

    python -m benchmarks.episodes [--methods full lora] [--rounds 3] [--updates 2] [--json FILE]
    python -m benchmarks.episodes --parts latency    64 episodes whose tool sleeps a second

``comparison``: both trainers play the same episodes, each in a process of its own; sides take turns, and so does who
goes first. Alike: the embedded model in bf16 with the chat template chatml-tools, prompts as token ids, the tool and
its results, the number of turns and the length of each, groups, micro-batches, the KL to a reference, all cores, torch
and transformers. Both are checked to have made every call of the script, and their tokens are counted. What a turn says
is scripted, because a model that has not learned to call tools calls none: ``episodes_work`` has the script,
``episodes_align`` and ``episodes_trl`` the two sides. An episode's sampling is everything from the prompts to the
finished episodes: new weights for the engine, turns, calls and their results, of align also the journal.

align samples with vLLM where it is installed. trl samples with transformers' ``generate`` unless ``--trl-engine vllm``
is given: vLLM in its process, as trl's ``vllm_mode="colocate"`` starts it. ``--engine transformers`` has both sample
with transformers. trl's weights are bfloat16 (``--trl-weights``), where it is fastest. The first update of a run is not
counted. Targets: no slower than trl by the episode sampled, at most half of its time by the update.

``latency``: align alone. Episodes are played with a tool that returns at once and with one that sleeps, in turn, by
vLLM in this process. Target: at most 1.3 times the seconds without sleeping and one call for each turn. The share of
prompt tokens that came from vLLM's prefix cache is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.pipeline.process_limits import SPINNING
from align.runner.huge_pages import page_environment
from align.runner.worker import ENVIRONMENT
from benchmarks.episodes_table import episode_seconds, latency_lines, latency_summary, lines, summary
from benchmarks.episodes_work import EpisodeShape
from benchmarks.ppo_table import Round, Run
from benchmarks.ppo_vs_trl import RunFailed, run_module
from benchmarks.ppo_work import inventory

SIDES = {"align": "benchmarks.episodes_align", "trl": "benchmarks.episodes_trl"}
TRL = "1.16.0"
"""The release that is compared, which is also the one that align trains with."""
PARTS = ("comparison", "latency")


@dataclass(frozen=True)
class Runs:
    """Starts the benchmark's processes, in ``folder``."""

    options: argparse.Namespace
    folder: Path

    def prepare(self, shape: EpisodeShape) -> None:
        """Write the work of ``shape``."""
        arguments = [json.dumps(asdict(shape)), str(self.folder)]
        run_module(Path(sys.executable), "benchmarks.episodes_work", arguments, self.folder / "prepare.log")

    def run(self, side: str, module: str, arguments: list[str]) -> Run:
        """Run one process on the work there is, and return what it measured."""
        out = self.folder / "result.json"
        # As align's runner starts a stage; trl's side starts with the user's own environment.
        more = {**ENVIRONMENT, **page_environment(), **SPINNING} if side == "align" else {}
        paths = [str(self.folder / "work.json"), str(out)]
        run_module(Path(sys.executable), module, [*paths, *arguments], self.folder / f"{side}.log", more)
        result: Run = json.loads(out.read_text(encoding="utf-8"))
        out.unlink()
        return result

    def side(self, side: str, method: str) -> Run:
        """Run one side; updates that warm up are apart."""
        print(f"  {method}: {side} ...", end="", flush=True)
        result = self.run(side, SIDES[side], side_arguments(self.options, side, method))
        warm_up = self.options.warm_up
        result["warm_up"], result["updates"] = result["updates"][:warm_up], result["updates"][warm_up:]
        seconds = episode_seconds(result)
        print(f" {seconds['sampling']:.2f} s to sample an episode, {seconds['update']:.1f} s an update", flush=True)
        return result

    def rounds(self, method: str) -> list[Round]:
        """Return alternating runs of both sides."""
        rounds = []
        for index in range(self.options.rounds):
            order = self.options.sides if index % 2 == 0 else list(reversed(self.options.sides))
            runs = {side: self.side(side, method) for side in order}
            rounds.append({side: runs[side] for side in self.options.sides})
        return rounds


def side_arguments(options: argparse.Namespace, side: str, method: str) -> list[str]:
    """Return the arguments of a side's module behind its paths."""
    arguments = ["--method", method, "--kl", str(options.kl)]
    if side == "align":
        reuse = 1.0 if method == "lora" else 0.0
        return [*arguments, "--engine", options.engine, "--reuse-forward", str(reuse), "--workers", str(options.batch)]
    return [*arguments, "--engine", options.trl_engine, "--weights", options.trl_weights]


def compare(runs: Runs, shape: EpisodeShape) -> dict[str, Any]:
    """Run both sides with all methods, print a table each, and return everything measured."""
    runs.prepare(shape)
    results: dict[str, Any] = {}
    for method in runs.options.methods:
        rounds = runs.rounds(method)
        print(f"\n{method}: {shape.batch} episodes of up to {shape.turns} turns of up to {shape.tokens} tokens")
        print("\n".join([*lines(rounds), ""]), flush=True)
        results[method] = {"rounds": rounds, "summary": summary(rounds)}
    return results


def latency(runs: Runs, shape: EpisodeShape) -> dict[str, Any]:
    """Play with slow tools, print what they cost, and return everything measured."""
    runs.prepare(shape)
    options = runs.options
    engine = "vllm" if options.engine == "auto" else options.engine
    arguments = ["--engine", engine, "--tool-seconds", str(options.latency_seconds), "--isolation", options.isolation]
    workers = options.workers or shape.batch
    result = runs.run("align", "benchmarks.episodes_latency", [*arguments, "--workers", str(workers)])
    print("\n".join([*latency_lines(result), ""]), flush=True)
    return result | {"summary": latency_summary(result)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, with their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="of the comparison")
    add("--methods", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    add("--rounds", type=int, default=3, help="runs of each side and method; pairs of plays of the latency part")
    add("--updates", type=int, default=2, help="updates of a run that count")
    add("--warm-up", type=int, default=1, help="updates before them")
    add("--batch", type=int, default=16, help="episodes an update")
    add("--samples", type=int, default=4, help="episodes of a prompt: the group")
    add("--turns", type=int, default=3, help="turns of an episode, at most; all but the last call the tool")
    add("--tokens", type=int, default=64, help="sampled tokens of a turn, at most; a call takes 32")
    add("--result-words", type=int, default=12, help="words of a tool's result")
    add("--lengths", choices=("mixed", "full"), default="mixed", help="of episodes and turns; full: all the longest")
    add("--tool-seconds", type=float, default=0.0, help="seconds that the tool of the comparison sleeps")
    add("--micro-batch", type=int, default=8, help="episodes of a training pass, on both sides")
    add("--kl", type=float, default=0.04, help="weight of the KL to the reference, on both sides")
    add("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="what align samples with")
    add("--trl-engine", choices=("vllm", "transformers"), default="transformers", help="what trl samples with")
    add("--trl-weights", choices=("bfloat16", "float32"), default="bfloat16", help="type of trl's trained weights")
    add("--latency-episodes", type=int, default=64, help="episodes of the latency part")
    add("--latency-turns", type=int, default=4, help="turns of these, at most")
    add("--latency-seconds", type=float, default=1.0, help="seconds that the tool of these sleeps")
    add("--workers", type=int, help="calls of the latency part under way at once; by default one for each episode")
    add("--isolation", choices=("thread", "process"), default="thread", help="where the tools of these run")
    add("--tiny", action="store_true", help="a two-layer model of random weights, to try the benchmark")
    add("--json", type=Path, help="write everything there")
    options = parser.parse_args(arguments)
    options.sides = [side for side in SIDES if side in options.sides]
    for name in ("rounds", "updates", "turns"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: at least 1")
    for name, episodes in (("batch", options.batch), ("latency-episodes", options.latency_episodes)):
        if episodes % options.samples:
            parser.error(f"--{name} {episodes} is not a multiple of --samples {options.samples}")
    if options.batch % options.micro_batch:
        parser.error(f"--batch {options.batch} is not a multiple of --micro-batch {options.micro_batch}")
    return options


def comparison_shape(options: argparse.Namespace) -> EpisodeShape:
    """Return the work of the comparison."""
    return EpisodeShape(
        batch=options.batch,
        samples=options.samples,
        turns=options.turns,
        tokens=options.tokens,
        result_words=options.result_words,
        tool_seconds=options.tool_seconds,
        lengths=options.lengths,
        micro_batch=options.micro_batch,
        updates=options.warm_up + options.updates,
        tiny=options.tiny,
    )


def latency_shape(options: argparse.Namespace) -> EpisodeShape:
    """Return the work of the latency part: a play that warms up, then pairs of plays."""
    return EpisodeShape(
        batch=options.latency_episodes,
        samples=options.samples,
        turns=options.latency_turns,
        tokens=options.tokens,
        result_words=options.result_words,
        lengths=options.lengths,
        updates=1 + 2 * options.rounds,
        tiny=options.tiny,
    )


def check_trl(packages: dict[str, str]) -> None:
    """Raise ``UserError`` for another release of trl than the one that is compared."""
    if packages.get("trl") != TRL:
        raise UserError(f"trl {packages.get('trl')} is installed; the comparison is with {TRL}. Install that one.")


def main() -> None:
    """Measure what ``--parts`` names; exit code 2 for packages or work that do not fit, 1 for a run that failed."""
    options = parse()
    results: dict[str, Any] = {}
    try:
        packages = inventory(Path(sys.executable))
        check_trl(packages)
        with tempfile.TemporaryDirectory(prefix="align-episodes-") as folder:
            runs = Runs(options, Path(folder))
            if "comparison" in options.parts:
                results["comparison"] = compare(runs, comparison_shape(options))
            if "latency" in options.parts:
                results["latency"] = latency(runs, latency_shape(options))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except RunFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        sys.exit(1)
    finally:
        # What was measured before a failure is kept.
        if options.json and results:
            settings = {name: value for name, value in vars(options).items() if name != "json"}
            about = {"settings": settings, "packages": packages, "found": results}
            options.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
