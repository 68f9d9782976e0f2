"""Training speed of one LoRA step on the embedded model, against the machine's measured matrix peak.

    python -m benchmarks.training [--rows 16] [--length 128] [--steps 5]

Floor: 6 FLOPs per parameter and token for a full step, 4 with LoRA (no gradients of the frozen weights), over the rate
of a large bf16 matrix product on the same machine in the same process.
"""

import argparse
import statistics
import time


def matrix_peak() -> float:
    """bf16 FLOP/s of a 2048-square product, best of ten."""
    import torch

    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def step_seconds(method: str, rows: int, length: int, steps: int) -> tuple[float, int]:
    """Median seconds of an optimizer step, and the model's parameters."""
    import torch

    from align.config.tuning import FullTuning, LoraTuning
    from align.models.built_in import fetch
    from align.models.compute.precision import autocast
    from align.models.loading import load_policy
    from align.models.tuning.apply import apply_tuning

    model = load_policy(fetch())
    parameters = sum(weight.numel() for weight in model.parameters())
    model = apply_tuning(model, LoraTuning(method="lora") if method == "lora" else FullTuning(), 0)
    model.train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4)
    ids = torch.randint(10, 1000, (rows, length))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with autocast(torch.device("cpu"), "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), parameters


def main() -> None:
    """Print tokens/s and the share of the matrix peak, full tuning and LoRA in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    peak = matrix_peak()
    print(f"matrix peak   {peak / 1e9:7.0f} GFLOP/s (bf16, 2048 square)")
    tokens = options.rows * options.length
    for method, flops in (("full", 6), ("lora", 4)):
        seconds, parameters = step_seconds(method, options.rows, options.length, options.steps)
        share = flops * parameters * tokens / seconds / peak
        print(f"{method:<13} {tokens / seconds:7.0f} tokens/s, {share:.0%} of the peak")


if __name__ == "__main__":
    main()
