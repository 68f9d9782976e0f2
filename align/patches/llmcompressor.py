"""Patches for llm-compressor, which runs in an interpreter without align: this file imports nothing of align."""


def skip_pinning() -> None:
    """Let tensors stay where they are on a machine without an accelerator.

    Replaces ``torch.Tensor.pin_memory``. llm-compressor 0.14 pins AWQ's activations on every machine, which torch
    refuses without an accelerator.
    """
    import torch

    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *device: tensor  # type: ignore[method-assign]
