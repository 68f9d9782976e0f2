"""Sampling speed: vLLM against transformers' ``generate()``, side by side, on the embedded model.

    python -m benchmarks.rollouts [--prompts 64] [--tokens 40] [--rounds 3]

Each engine runs in a process of its own, in turn, so that neither disturbs the other; responses have a fixed length
(the end-of-turn token is banned in both). Quote the ratio: single rates move with whatever else the machine does.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time


def measure(engine: str, prompts: int, tokens: int) -> float:
    """Generated tokens per second of one engine in this process, after a warm-up."""
    import torch

    from align.data.embedded import generate
    from align.models.embedded import fetch
    from align.models.loading import load_policy, load_tokenizer
    from align.models.render import render_prompt

    folder = fetch()
    tokenizer = load_tokenizer(folder)
    inputs = [render_prompt(tokenizer, row["prompt"]) for row in generate(prompts, 0)]
    if engine == "vllm":
        import os

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams

        from align.rollouts.engine import open_engine  # noqa: F401  (the environment it sets)

        llm = LLM(str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=64)
        fixed = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)

        def run() -> None:
            llm.generate([{"prompt_token_ids": ids} for ids in inputs], fixed, use_tqdm=False)
    else:
        model = load_policy(folder, dtype=torch.bfloat16).eval()
        tokenizer.padding_side = "left"

        def run() -> None:
            for at in range(0, len(inputs), 64):
                batch = tokenizer.pad({"input_ids": inputs[at : at + 64]}, return_tensors="pt")
                with torch.inference_mode():
                    model.generate(
                        **batch, do_sample=True, temperature=1.0, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens,
                        pad_token_id=tokenizer.pad_token_id,
                    )  # fmt: skip

    run()
    start = time.perf_counter()
    run()
    return prompts * tokens / (time.perf_counter() - start)


def main() -> None:
    """Run the engines in turn and print the median rate and the ratio round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=["vllm", "transformers"], help="measure one, here, and print JSON")
    options = parser.parse_args()
    if options.engine:
        print(json.dumps({"rate": measure(options.engine, options.prompts, options.tokens)}))
        return
    rates: dict[str, list[float]] = {"vllm": [], "transformers": []}
    for _ in range(options.rounds):
        for engine, found in rates.items():
            command = [sys.executable, "-m", "benchmarks.rollouts", "--engine", engine]
            command += ["--prompts", str(options.prompts), "--tokens", str(options.tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.strip().splitlines()[-1])["rate"])
    for engine, found in rates.items():
        print(f"{engine:<13} {statistics.median(found):7.0f} tokens/s  {[round(rate) for rate in found]}")
    ratios = [a / b for a, b in zip(rates["vllm"], rates["transformers"], strict=True)]
    print(f"ratio         {statistics.median(ratios):7.2f}           {[round(ratio, 2) for ratio in ratios]}")


if __name__ == "__main__":
    main()
