"""``runtime.executor``: its forms, what is merged for a stage, and what is refused with the executor that has it."""

from __future__ import annotations

from typing import Any

from align.config.runtime import Runtime
from align.config.runtime.executor import LocalExecutor, RayExecutor, SamplersConfig, SlurmExecutor
from align.config.validation import validate
from tests.support.refusals import Refused


def runtime(**fields: Any) -> Runtime:
    return validate(Runtime, fields, "p.yaml: runtime")


def test_the_name_alone_is_the_short_form_and_local_the_default() -> None:
    assert runtime().executor == LocalExecutor()
    assert runtime(executor="slurm") == runtime(executor={"name": "slurm"})
    assert runtime(executor="ray").executor == RayExecutor()
    block = {"name": "slurm", "partition": "gpu", "sbatch": {"mail-type": "END"}, "tasks": 9}
    assert runtime(executor=block).executor == SlurmExecutor(partition="gpu", sbatch={"mail-type": "END"}, tasks=9)


def test_stage_fields_override_run_fields_of_same_executor() -> None:
    settings = runtime(
        executor={"name": "slurm", "partition": "gpu", "gpus": 1, "grace": 90},
        stages={"ppo": {"executor": {"gpus": 4}}, "data": {"executor": {"name": "ray", "tasks": 5}}, "dpo": {}},
    )
    assert settings.for_stage("ppo").executor == SlurmExecutor(partition="gpu", gpus=4, grace=90)
    assert settings.for_stage("data").executor == RayExecutor(tasks=5)
    assert settings.for_stage("dpo").executor == settings.executor
    # 60, the default of ``grace``, must not come back with a block that does not set it
    longer = runtime(executor={"name": "slurm", "grace": 600}, stages={"ppo": {"executor": {"time": "1:00:00"}}})
    assert longer.for_stage("ppo").executor == SlurmExecutor(time="1:00:00", grace=600)


def test_a_stage_s_time_limit_is_checked_with_the_run_s_grace(refused: Refused) -> None:
    settings = runtime(executor={"name": "slurm", "grace": 600}, stages={"ppo": {"executor": {"time": "00:10:00"}}})
    refused(settings.for_stage, "ppo", where="p: runtime.stages")


def test_a_block_made_in_python_is_read_again_as_it_was() -> None:
    settings = Runtime(executor=SlurmExecutor(partition="cpu"))
    assert settings.for_stage("any") == settings
    assert validate(Runtime, settings.model_dump(mode="json"), "x") == settings


def test_only_ray_has_samplers() -> None:
    assert runtime(executor={"name": "ray", "samplers": {"count": 4}}).samplers.count == 4
    assert runtime(executor="slurm").samplers == SamplersConfig()
