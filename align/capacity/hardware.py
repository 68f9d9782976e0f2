"""Devices with their memory, speed, links and price, and the notation ``4x8xh100``. Never imports torch.

Speeds are from the makers' data sheets (dense products, no sparsity). Memory is what torch reports on such a card,
which is less than its name says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.machine_limits import usable_cores, usable_memory

GIB = 2**30
PRICES_FROM = (
    "rates on demand in US dollars, early 2026: RunPod's as listed by deploybase.ai (March 2026), an A100 of 40 GB by "
    "alloclabs.com (February 2026); prices move, so give yours with --price"
)
"""Source of the prices."""
CPU_GFLOPS_PER_CORE = {"bfloat16": 200.0, "float32": 90.0}
"""Rate of a 2048-square matrix product on one core of an AMD EPYC with avx512_bf16 (docs/performance.md)."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one machine's processor."""

    name: str
    memory: int
    """Bytes available to programs."""
    flops: float
    """Peak operations per second of matrix products in bfloat16."""
    flops_float32: float
    bandwidth: float
    """Bytes per second from its memory."""
    link: float
    """Bytes per second to the other devices of a machine, each way."""
    network: float = 50e9
    """Bytes per second and device to other machines, each way: 400 Gbit/s."""
    price: float | None = None
    """US dollars per hour."""
    context: int = int(0.7 * GIB)
    """Bytes that the driver and the libraries need before any tensor."""
    host: int = 200 * GIB
    """Bytes of the machine's own memory for each device."""
    gpu: bool = True

    @property
    def usable(self) -> int:
        """Bytes for tensors; 5 % of the memory stays free for fragmentation."""
        return int(0.95 * self.memory) - self.context


def _card(
    name: str, gib: float, tflops: float, tflops_float32: float, terabytes: float, link: float, price: float
) -> Device:
    return Device(name, int(gib * GIB), tflops * 1e12, tflops_float32 * 1e12, terabytes * 1e12, link * 1e9, price=price)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # name, GiB, TFLOP/s in bfloat16 and float32 (TF32 products), TB/s, GB/s to its neighbors each way, dollars
        _card("b200", 178.4, 2250, 1125, 8.0, 900, 5.98),
        _card("h200", 139.8, 989, 495, 4.8, 450, 3.59),
        _card("h100", 79.1, 989, 495, 3.35, 450, 2.69),
        _card("a100-80", 79.2, 312, 156, 2.04, 300, 1.39),
        _card("a100-40", 39.4, 312, 156, 1.555, 300, 1.50),
        _card("l40s", 44.5, 362, 183, 0.864, 25, 0.79),
        _card("l4", 22.0, 121, 60, 0.3, 25, 0.44),
        _card("a10g", 22.0, 70, 35, 0.6, 25, 1.00),
        _card("rtx4090", 23.5, 165, 83, 1.008, 25, 0.34),
        _card("rtx3090", 23.6, 71, 36, 0.936, 25, 0.22),
    )
}
"""Cards by their name in ``--hardware``."""
ALIASES = {"a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090", "h100-80": "h100"}
CPU = re.compile(r"cpu(-(?P<gib>[1-9]\d{0,4}))?")
NOTATION = re.compile(r"((?P<first>[1-9]\d{0,3})x)?((?P<second>[1-9]\d{0,3})x)?(?P<name>[a-z][a-z0-9-]*|\d{4})")


@dataclass(frozen=True)
class Hardware:
    """``nodes`` machines with ``per_node`` devices each."""

    device: Device
    nodes: int = 1
    per_node: int = 1

    @property
    def devices(self) -> int:
        """Number of devices on all machines."""
        return self.nodes * self.per_node

    @property
    def label(self) -> str:
        """Notation of the hardware, such as ``4x8xh100``."""
        if self.nodes > 1:
            return f"{self.nodes}x{self.per_node}x{self.device.name}"
        if self.per_node > 1:
            return f"{self.per_node}x{self.device.name}"
        return self.device.name


def parse_hardware(text: str, price: float | None = None) -> Hardware:
    """Parse ``cpu``, ``1xa100-40``, ``8xh100`` or ``4x8xh100`` (machines, devices of each); ``cpu-64`` has 64 GiB.

    ``price`` replaces the table's, in dollars per hour and device. Raises ``UserError`` for any other text.
    """
    match = NOTATION.fullmatch(text.strip().lower())
    name = match["name"] if match else text
    processor = CPU.fullmatch(name)
    device = _processor(processor["gib"]) if processor else DEVICES.get(ALIASES.get(name, name))
    if match is None or device is None:
        raise UserError(
            f"--hardware {text}: expected a number of devices and their name, such as 8xh100, 1xa100-40, cpu, or "
            f"4x8xh100 for four machines of eight.{suggest(name, [*DEVICES, *ALIASES, 'cpu'])}"
        )
    if price is not None:
        device = replace(device, price=price)
    first, second = int(match["first"] or 1), match["second"]
    # ``8xh100`` is one machine with eight devices, ``4x8xh100`` four such machines.
    nodes, per_node = (first, int(second)) if second else (1, first)
    if not device.gpu:
        # Processes on one processor share its cores and memory, which cards do not.
        device = _divide_processor(device, per_node)
    return Hardware(device, nodes, per_node)


def _divide_processor(device: Device, processes: int) -> Device:
    """Return one process's share of a processor's memory and cores."""
    if processes == 1:
        return device
    return replace(
        device,
        memory=device.memory // processes,
        flops=device.flops / processes,
        flops_float32=device.flops_float32 / processes,
        bandwidth=device.bandwidth / processes,
        host=device.memory // processes,
    )


def _processor(gib: str | None) -> Device:
    """Return this machine's processor; ``gib`` replaces the machine's memory."""
    cores = usable_cores()
    memory = int(gib) * GIB if gib else usable_memory()
    return Device(
        name="cpu" if gib is None else f"cpu-{gib}",
        memory=memory,
        flops=cores * CPU_GFLOPS_PER_CORE["bfloat16"] * 1e9,
        flops_float32=cores * CPU_GFLOPS_PER_CORE["float32"] * 1e9,
        bandwidth=20e9,
        link=10e9,
        network=1.25e9,
        price=0.0,
        context=int(0.8 * GIB),
        host=memory,
        gpu=False,
    )
