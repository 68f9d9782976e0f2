"""Precision of the matrix products, and the measured speeds that decide what ``precision: auto`` stands for.

Trained weights and AdamW's state are float32 whatever the precision is. bfloat16 keeps 8 bits of a number: at a
learning rate of 1e-6 an update is smaller than the rounding of a weight near 0.02 and is lost. So trained weights are
float32 masters, and ``torch.autocast`` rounds only the operands of matrix products. A frozen matrix is kept in the type
of its products. ``low_residual`` goes further and rounds the activations
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
from typing import Any

import torch
from torch import nn

from align.config.base import Precision, PrecisionSetting
from align.models.compute.costs import ProductSpeed, read_speed, write_speed


def autocast(device: Any, precision: Precision) -> Any:
    """Return a context in which a forward pass computes in ``precision``; it has no effect for float32."""
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


def _matrices(model: nn.Module) -> list[Any]:
    """Return the linear layers and embeddings of ``model`` whose weights may be rounded before autocast does it.

    Embeddings with their own class are omitted: Gemma's scale their rows by a factor that has the type of the
    weight. So is a head that shares such a weight.
    """
    modules = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]
    special = {
        id(module.weight)
        for module in modules
        if isinstance(module, torch.nn.Embedding) and type(module) is not torch.nn.Embedding
    }
    return [module for module in modules if id(module.weight) not in special]


def _frozen_matrices(model: nn.Module) -> list[tuple[Any, str]]:
    """Return module and name of each frozen matrix of ``model``; all experts of a layer are one parameter."""
    places = [(module, "weight") for module in _matrices(model)]
    for path, module in model.named_modules():
        if path.endswith("experts"):
            places += [(module, name) for name, matrix in module.named_parameters(recurse=False) if matrix.dim() == 3]
    matrices = [(place, getattr(*place)) for place in places]
    return [place for place, matrix in matrices if matrix.is_floating_point() and not matrix.requires_grad]


def cast_frozen_to_bf16(model: nn.Module, *, experts: bool = False) -> None:
    """Keep the frozen matrices of ``model`` in bfloat16, as autocast would cast them in every pass.

    Models that share the tensors are rounded as well. Autocast does not reach the experts of a mixture, so rounding
    them changes its numbers: only a base that policy and reference share has them rounded (``experts``).
    """
    for module, name in _frozen_matrices(model):
        matrix = getattr(module, name)
        if experts or matrix.dim() == 2:
            matrix.data = matrix.data.to(torch.bfloat16)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32:
            # The rest (norms) may belong to a memory-mapped file, which would stay in memory as a whole.
            parameter.data = parameter.data.clone()


def widen_vectors(model: nn.Module) -> None:
    """Make everything but the frozen matrices of ``model``, which is in bfloat16, float32: norms, biases, heads."""
    matrices = {id(getattr(*place)) for place in _frozen_matrices(model)}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in matrices and tensor.is_floating_point():
            tensor.data = tensor.data.float()


def widen_trained(model: nn.Module) -> None:
    """Make trained parameters float32: peft copies modules and rows in the type of the frozen ones."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()


@contextmanager
def float32_products(model: nn.Module) -> Iterator[None]:
    """Inside, and outside of autocast, a frozen bfloat16 matrix is cast to float32 while its module computes."""
    narrow: dict[Any, dict[str, Any]] = {}
    for module, name in _frozen_matrices(model):
        if getattr(module, name).dtype == torch.bfloat16:
            narrow.setdefault(module, {})[name] = getattr(module, name)

    def widen(module: Any, inputs: Any) -> None:
        for name, matrix in narrow[module].items():
            setattr(module, name, torch.nn.Parameter(matrix.data.float(), requires_grad=False))

    def restore(module: Any, inputs: Any, output: Any) -> None:
        for name, matrix in narrow[module].items():
            setattr(module, name, matrix)

    handles = [module.register_forward_pre_hook(widen) for module in narrow]
    handles += [module.register_forward_hook(restore, always_call=True) for module in narrow]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


CPU_SHAPE = (128, 1024, 1024)
"""Rows, inputs and outputs of the product on a processor; float32 needs 2 ms on two cores, emulated bfloat16 30."""
GPU_SHAPE = (4096, 4096, 4096)
"""A product that keeps a GPU busy: in a smaller one both types need the time of the launch."""
TYPE_SECONDS = 0.02
"""Measuring a type ends after this many seconds, but not before one product after the warm-up."""


def product_speed(device: torch.device) -> ProductSpeed:
    """Return the speed of products on ``device``, measured now if it was not measured on this machine before."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    speed = read_speed(name)
    if speed is None:
        speed = measure(device)
        write_speed(speed, name)
    return speed


def measure(device: torch.device) -> ProductSpeed:
    """Measure products on ``device`` with torch's current threads."""
    return ProductSpeed(_speed_in(torch.bfloat16, device), _speed_in(torch.float32, device))


def resolve_precision(setting: PrecisionSetting, device: torch.device) -> Precision:
    """Return the type that ``setting`` stands for on ``device``."""
    return product_speed(device).faster if setting == "auto" else setting


def _speed_in(dtype: torch.dtype, device: torch.device) -> float:
    """Return the GFLOP/s of the fastest of several products."""
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
    _synchronize(rows_matrix.device)
    start = time.perf_counter()
    torch.nn.functional.linear(rows_matrix, weight)
    _synchronize(rows_matrix.device)
    return max(time.perf_counter() - start, 1e-9)


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
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
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return TorchSetup(
        version=torch.__version__,
        cuda_devices=tuple((device.name, device.total_memory) for device in properties),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_speed=product_speed(torch.device("cpu")),
    )
