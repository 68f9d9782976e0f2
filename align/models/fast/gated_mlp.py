"""Gated MLPs that use memory again where nothing is learned.

transformers computes ``down(silu(gate(x)) * up(x))`` with a new tensor of the MLP's width for each of the two
operations between the products. Fresh memory is cleared page by page, which on a CPU shows in the time of a pass
(docs/performance.md). Without gradients nobody reads the gate any more, so both write over it: the same numbers. Left
out: passes that are learned from, where autograd would copy the gate first, MLPs that are not written as Llama's, and
other activations; they work as before.
"""

from __future__ import annotations

from typing import Any

import torch

from align.models.fast.norms import replace_classes, source_lines


def lean_mlps(model: Any) -> int:
    """Let every gated MLP of ``model`` that is written as Llama's write over its gate; return their number."""
    return replace_classes(model, _is_llama_mlp, _make_lean)


def _make_lean(mlp: type) -> type:
    from transformers.activations import SiLUActivation

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
        if torch.is_grad_enabled() or not isinstance(self.act_fn, (SiLUActivation, torch.nn.SiLU)):
            plain: torch.Tensor = mlp.forward(self, x)  # type: ignore[attr-defined]
            return plain
        gate, up = self.gate_proj(x), self.up_proj(x)
        torch.nn.functional.silu(gate, inplace=True)
        # A product of two types would be of the wider one.
        gated = gate.mul_(up) if gate.dtype == up.dtype else gate * up
        output: torch.Tensor = self.down_proj(gated)
        return output

    return type(mlp.__name__, (mlp,), {"forward": forward, "writes_over_gate": True})


def _is_llama_mlp(mlp: type) -> bool:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward: Any = getattr(mlp, "forward", None)
    if not mlp.__name__.endswith("MLP") or forward is None or hasattr(mlp, "writes_over_gate"):
        return False
    source = source_lines(forward)
    return bool(source) and source == source_lines(LlamaMLP.forward)
