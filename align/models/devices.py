"""The torch that is installed, and the devices that it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from align.models.compute_types import ProductSpeed
from align.models.product_speed import product_speed


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
