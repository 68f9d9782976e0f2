"""Sampling speed: align's vLLM engine and server, vLLM as it comes, and transformers' ``generate()``, side by side.

    python -m benchmarks.rollouts [--prompts 32] [--samples 4] [--tokens 48] [--rounds 3]

What PPO and the sample stage ask for: several seeded responses to each prompt with the log-probabilities of their
tokens, ended by the end-of-turn token or cut at ``--tokens``. Each runs in a process of its own, in turn, after a
warm-up, on the embedded model in bf16 at batch 64; rates count response tokens. ``--engine`` measures one engine and
its start. Quote the ratio: single rates move with whatever else the machine does.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINES = ("align", "server", "vllm", "transformers")
BATCH = 64


def align_engine(
    folder: Path, inputs: list[list[int]], samples: int, tokens: int, servers: int = 0
) -> Callable[[int], int]:
    """Return a sampling run of the engine that stages use, in this process or in servers of its own."""
    from align.config.runtime import EngineConfig, Runtime
    from align.config.runtime.rollouts import RolloutsConfig
    from align.inference.engine import open_engine
    from align.inference.protocol import Sampling

    engine = open_engine(
        folder,
        Runtime(engine=EngineConfig(name="vllm", batch_size=BATCH), rollouts=RolloutsConfig(servers=servers)),
        precision="bfloat16",
        max_length=512,
        seed=0,
        warn=print,
    )

    def run(seed: int) -> int:
        responses = engine.generate(inputs, Sampling(tokens, n=samples, seed=seed))
        return sum(len(response.token_ids) for group in responses for response in group)

    return run


def plain_vllm(folder: Path, inputs: list[list[int]], samples: int, tokens: int) -> Callable[[int], int]:
    """Return a sampling run of vLLM with its own defaults, beside what the task fixes."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=BATCH)

    def run(seed: int) -> int:
        params = SamplingParams(temperature=1.0, max_tokens=tokens, n=samples, seed=seed, logprobs=0)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in inputs], params, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    return run


def plain_transformers(folder: Path, inputs: list[list[int]], samples: int, tokens: int) -> Callable[[int], int]:
    """Return a run of ``generate()`` with left padding; the log-probabilities come from its logits."""
    import torch

    from align.models.loading import load_policy, load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    model = load_policy(folder, dtype=torch.bfloat16).eval()
    tokenizer.padding_side = "left"
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": tokens}

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        count, step = 0, BATCH // samples
        for start in range(0, len(inputs), step):
            batch = tokenizer.pad({"input_ids": inputs[start : start + step]}, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(
                    **batch, **options, num_return_sequences=samples, pad_token_id=tokenizer.pad_token_id,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
                new = out.sequences[:, batch["input_ids"].shape[1] :]
                for position, logits in enumerate(out.logits):
                    logits.float().log_softmax(-1).gather(1, new[:, position, None])
            ended = (new == tokenizer.eos_token_id).int().cumsum(dim=1)
            count += int(((ended == 0) | ((new == tokenizer.eos_token_id) & (ended == 1))).sum())
        return count

    return run


def measure(engine: str, prompts: int, samples: int, tokens: int) -> dict[str, float]:
    """Return the response tokens per second of one engine, after a warm-up, and the seconds that its start took."""
    from align.data.families.embedded import generate
    from align.models.built_in import fetch
    from align.models.chat.render import render_prompt
    from align.models.loading import load_tokenizer

    folder = fetch()
    tokenizer = load_tokenizer(folder)
    inputs = [render_prompt(tokenizer, row["prompt"]) for row in generate(prompts, 0)]
    makers: dict[str, Callable[..., Callable[[int], int]]] = {
        "align": align_engine,
        "server": functools.partial(align_engine, servers=1),
        "vllm": plain_vllm,
        "transformers": plain_transformers,
    }
    began = time.perf_counter()
    run = makers[engine](folder, inputs, samples, tokens)
    opened = time.perf_counter()
    run(1)
    start = time.perf_counter()
    count = run(2)
    return {"rate": count / (time.perf_counter() - start), "start": opened - began}


def main() -> None:
    """Run the engines in turn and print each one's median rate, and align's ratio to the others round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="measure one, here, and print JSON")
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options.engine, options.prompts, options.samples, options.tokens)))
        return
    rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for _ in range(options.rounds):
        for engine, engine_rates in rates.items():
            command = [sys.executable, "-m", "benchmarks.rollouts", "--engine", engine]
            for name in ("prompts", "samples", "tokens"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            engine_rates.append(json.loads(done.stdout.strip().splitlines()[-1])["rate"])
    for engine, engine_rates in rates.items():
        print(f"{engine:<20} {statistics.median(engine_rates):7.0f} tokens/s  {[round(rate) for rate in engine_rates]}")
    for other in ENGINES[1:]:
        ratios = [a / b for a, b in zip(rates["align"], rates[other], strict=True)]
        print(f"align / {other:<12} {statistics.median(ratios):7.2f}           {[round(ratio, 2) for ratio in ratios]}")


if __name__ == "__main__":
    main()
