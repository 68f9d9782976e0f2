"""Precision of the matrix products, and the measured speeds that decide what ``precision: auto`` stands for.

Weights and AdamW's state are float32 whatever the precision is. bfloat16 keeps 8 bits of a number: at a learning rate
of 1e-6 an update is smaller than the rounding of a weight near 0.02 and is lost. So weights are float32 masters, and
``torch.autocast`` rounds only the operands of matrix products. ``low_residual`` goes further and rounds the activations
between them as well, as vLLM and the mixed precision of FSDP and DeepSpeed do. Measurements on SmolLM2-135M against
float32: log-probabilities are off by 0.037 nats on average rather than 0.031, the gradient's direction by
1 - cos = 4e-5 rather than 2e-5.

Flags of a processor would be a guess at the faster type: some emulate bfloat16, some restrict instructions by a
variable, and GPUs differ. Two products of a model's size need about 50 ms, once per machine and version of torch. The
speeds are in ``costs.py``, which a plan reads without torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.config.base import Precision, PrecisionSetting
from align.models.compute.costs import ProductSpeed, read_speed, write_speed

if TYPE_CHECKING:
    import torch


def autocast(device: Any, precision: Precision) -> Any:
    """Return a context in which a forward pass computes in ``precision``; it has no effect for float32."""
    import torch

    device_type = torch.device(device).type
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def disable_autocast_cache(accelerator: Any) -> None:
    """Let autocast cast trained matrices at each use instead of caching the copies until the end of the pass.

    For models with gradient checkpointing: each matrix is used once per pass, and the copies, 2 bytes per weight, would
    need most of the memory. No number changes.
    """
    from accelerate.utils import AutocastKwargs

    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Inside, autocast casts every matrix at each use and caches no copy.

    For passes with other values in trained matrices. Autocast caches copies by parameter: it would use a copy of the
    earlier values, or leave a copy for later passes.
    """
    import torch

    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def low_residual(model: Any) -> None:
    """Under autocast, let embeddings and norms of ``model`` return its type, so no float32 flows between layers.

    The weights do not change. Without autocast the model stays the same. A second call has no effect.
    """
    import torch

    from align.models.fast.lean_modules import LeanRMSNorm, lean_mlps, lean_norms

    if getattr(model, "has_low_residual", False):
        return
    model.has_low_residual = True
    lean_norms(model)
    lean_mlps(model)

    def cast_output(module: Any, inputs: Any, output: Any) -> Any:
        device_type = output.device.type
        if not torch.is_autocast_enabled(device_type):
            return output
        return output.to(torch.get_autocast_dtype(device_type))

    for module in model.modules():
        is_norm = isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        if isinstance(module, torch.nn.Embedding) or (is_norm and not isinstance(module, LeanRMSNorm)):
            module.register_forward_hook(cast_output)
        # peft casts an adapter's input to float32, and autocast casts it back. DoRA needs the first cast: it computes
        # the norms of its weights in the type of the input.
        if hasattr(module, "cast_input_dtype_enabled") and not any(getattr(module, "use_dora", {}).values()):
            module.cast_input_dtype_enabled = False


def _matrices(model: Any) -> list[Any]:
    """Return the linear layers and embeddings of ``model`` whose weights may be rounded before autocast does it.

    Embeddings with their own class are omitted: Gemma's scale their rows by a factor that has the type of the
    weight. So is a head that shares such a weight.
    """
    import torch

    modules = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]
    special = {
        id(module.weight)
        for module in modules
        if isinstance(module, torch.nn.Embedding) and type(module) is not torch.nn.Embedding
    }
    return [module for module in modules if id(module.weight) not in special]


def cast_frozen_to_bf16(model: Any) -> None:
    """Keep the frozen matrices of ``model`` in bfloat16, which autocast would otherwise cast in every pass.

    For models that are neither trained nor saved any more. Models that share the tensors are rounded as well.
    """
    import torch

    for module in _matrices(model):
        if module.weight.is_floating_point() and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(torch.bfloat16)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32:
            # The rest (norms) may belong to a memory-mapped file, which would stay in memory as a whole.
            parameter.data = parameter.data.clone()


@contextmanager
def frozen_in_bf16(model: Any) -> Iterator[None]:
    """Inside, keep one bfloat16 copy of ``model``'s frozen float32 matrices for all passes.

    Autocast would cast them in every pass, and each graph would hold its own copies. A graph that outlives the
    context keeps the one copy, while the module gets its float32 matrices back. No number changes under autocast.
    """
    import torch

    # Modules and their float32 weights, to be restored at the end.
    replaced: list[tuple[Any, Any]] = []
    rounded: dict[int, Any] = {}
    for module in _matrices(model):
        weight = module.weight
        if type(weight) is not torch.nn.Parameter or weight.requires_grad or weight.dtype != torch.float32:
            continue
        if id(weight) not in rounded:  # tied matrices stay tied
            rounded[id(weight)] = torch.nn.Parameter(weight.data.to(torch.bfloat16), requires_grad=False)
        replaced.append((module, weight))
        module.weight = rounded[id(weight)]
    try:
        yield
    finally:
        for module, weight in replaced:
            module.weight = weight


CPU_SHAPE = (128, 1024, 1024)
"""Rows, inputs and outputs of the product on a processor; float32 needs 2 ms on two cores, emulated bfloat16 30."""
GPU_SHAPE = (4096, 4096, 4096)
"""A product that keeps a GPU busy: in a smaller one both types need the time of the launch."""
TYPE_SECONDS = 0.02
"""Measuring a type ends after this many seconds, but not before one product after the warm-up."""


def product_speed(device: torch.device) -> ProductSpeed:
    """Return the speed of products on ``device``, measured now if it was not measured on this machine before."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    speed = read_speed(name)
    if speed is None:
        speed = measure(device)
        write_speed(speed, name)
    return speed


def measure(device: torch.device) -> ProductSpeed:
    """Measure products on ``device`` with torch's current threads."""
    import torch

    return ProductSpeed(_speed_in(torch.bfloat16, device), _speed_in(torch.float32, device))


def resolve_precision(setting: PrecisionSetting, device: torch.device) -> Precision:
    """Return the type that ``setting`` stands for on ``device``."""
    return product_speed(device).faster if setting == "auto" else setting


def _speed_in(dtype: torch.dtype, device: torch.device) -> float:
    """Return the GFLOP/s of the fastest of several products."""
    import torch

    rows, inputs, outputs = GPU_SHAPE if device.type == "cuda" else CPU_SHAPE
    rows_matrix = torch.ones(rows, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    _seconds(rows_matrix, weight)  # the first product also prepares kernels
    best = spent = _seconds(rows_matrix, weight)
    while spent < TYPE_SECONDS:
        seconds = _seconds(rows_matrix, weight)
        best = min(best, seconds)
        spent += seconds
    return 2 * rows * inputs * outputs / best / 1e9


def _seconds(rows_matrix: torch.Tensor, weight: torch.Tensor) -> float:
    import torch

    _synchronize(rows_matrix.device)
    start = time.perf_counter()
    torch.nn.functional.linear(rows_matrix, weight)
    _synchronize(rows_matrix.device)
    return max(time.perf_counter() - start, 1e-9)


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class TorchSetup:
    """An installed torch: its version, CUDA devices as (name, bytes of memory), CPU threads and instruction set."""

    version: str
    cuda_devices: tuple[tuple[str, int], ...]
    threads: int
    cpu_capability: str
    cpu_speed: ProductSpeed
    """Speed of the processor's matrix products."""

    @property
    def is_cpu_build(self) -> bool:
        """Return whether this torch was built without CUDA."""
        return "+cpu" in self.version


def torch_setup() -> TorchSetup:
    """Return the installed torch and its devices."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return TorchSetup(
        version=torch.__version__,
        cuda_devices=tuple((device.name, device.total_memory) for device in properties),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_speed=product_speed(torch.device("cpu")),
    )
