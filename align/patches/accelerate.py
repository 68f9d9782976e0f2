"""Patches of accelerate."""

from __future__ import annotations

from typing import Any

from align.patches.signatures import private_name


def use_gloo_on_cpus() -> None:
    """Have accelerate start several gloo processes on CPUs without ``use_cpu``.

    Replaces ``PartialState._prepare_backend``. With ``use_cpu`` accelerate silently ignores DeepSpeed, which also runs
    on CPUs. The patch was written for accelerate 1.15.
    """
    path = "accelerate.state:PartialState._prepare_backend"
    private_name("accelerate", path, ["self", "cpu", "sagemaker_dp", "backend"])
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_CPU

    PartialState._prepare_backend = gloo
