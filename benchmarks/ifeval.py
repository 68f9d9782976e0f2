"""IFEval beside vLLM's own generation of the same prompts.

    python -m benchmarks.ifeval --file ifeval/input_data.jsonl [--prompts 541] [--tokens 256] [--rounds 2]

The embedded model, bf16, greedy. ``vllm`` is ``LLM.generate`` alone, with the settings that a user would give it
(eager, batch 128); ``align`` is the whole task as an evaluation runs it: prompts read and rendered, answers sampled and
kept on disk, every instruction checked strictly and loosely. Neither counts the engine's start. Each runs in a process
of its own, in turn; quote the ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SIDES = ("vllm", "align")
BATCH = 128


def model_folder(folder: Path) -> Path:
    """The embedded model as a model stage writes it."""
    from align.models.built_in import fetch
    from align.models.checkpoints.conversion import copy_model

    out = folder / "model"
    if not out.exists():
        copy_model(fetch(lambda text: print(text, file=sys.stderr)), out, warn=lambda text: None)
    return out


def task_of(options: argparse.Namespace) -> Any:
    """Return the task, as an evaluation builds it."""
    from align.config.stages.evaluation.tasks import IfevalConfig
    from align.evaluation.tasks import build_task
    from align.evaluation.tasks.base import TaskInputs

    config = IfevalConfig(files=[options.file], max_tokens=options.tokens, max_items=options.prompts)
    inputs = TaskInputs(0, Path.cwd(), [], False, "bfloat16", lambda text: None, lambda text: None)
    return build_task("ifeval", config, inputs)


def run_vllm(model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Measure ``LLM.generate`` on the rendered prompts."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from align.models.chat.render import render_prompt
    from align.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    prompts = [render_prompt(tokenizer, list(item.prompt)) for item in task_of(options).items]
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(str(model), dtype="bfloat16", enforce_eager=True, max_model_len=2048, max_num_seqs=BATCH,
              generation_config="vllm", disable_log_stats=True,
              gpu_memory_utilization=0.3)  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens)
    llm.generate([TokensPrompt(prompt_token_ids=prompts[0])], SamplingParams(max_tokens=4), use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


def run_align(model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Measure the task through the evaluation's own parts."""
    from align.config.runtime import EngineConfig, Runtime
    from align.evaluation.participants import Respondent
    from align.evaluation.systems import Policy, ResponseCache, Sampler, make_systems
    from align.inference.engine import open_engine
    from align.inference.protocol import Sampling
    from align.models.loading import load_tokenizer

    runtime = Runtime(engine=EngineConfig(name="vllm", batch_size=BATCH))
    policy = Policy("model", model, "key", load_tokenizer(model))
    (system,) = make_systems([policy], "model", {}, Path.cwd())
    engine = open_engine(model, runtime, precision="bfloat16", max_length=2048, seed=0, warn=print)
    engine.generate([[1, 2, 3]], Sampling(4))
    with tempfile.TemporaryDirectory() as cache_folder:
        start = time.perf_counter()
        task = task_of(options)
        built = time.perf_counter()
        cache = ResponseCache(Path(cache_folder), print)
        sampler = Sampler([policy], runtime, lambda *arguments: engine, cache, warn=print, progress=lambda *_: None)
        answers = task.respond(Respondent(system, sampler, 2048, print))
        answered = time.perf_counter()
        context = SimpleNamespace(progress=lambda *arguments: None, warn=print)
        measured = task.score({"model": answers}, context)["model"]
        end = time.perf_counter()
    strict = measured.values["prompt_strict"]
    return {"seconds": end - start, "tokens": sampler.tokens, "reading": built - start, "answering": answered - built,
            "checking": end - answered, "prompt_strict": sum(value[0] for value in strict) / len(strict)}  # fmt: skip


def main() -> None:
    """Run both in turn and print each figure and the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", required=True, help="google/IFEval's input_data.jsonl")
    parser.add_argument("--prompts", type=int, default=541)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        results = {"vllm": run_vllm, "align": run_align}[options.side](Path(options.folder), options)
        print("RESULT " + json.dumps(results))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(Path(folder))
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                command = [sys.executable, "-m", "benchmarks.ifeval", "--side", side, "--folder", str(model)]
                command += ["--file", options.file, "--prompts", str(options.prompts), "--tokens", str(options.tokens)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                results = json.loads(done.stdout.rpartition("RESULT ")[2])
                seconds[side].append(results["seconds"])
                print(side, json.dumps({name: round(value, 3) for name, value in results.items()}), flush=True)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        print(f"align takes {medians['align'] / medians['vllm']:.2f} of vLLM's generation time")


if __name__ == "__main__":
    main()
