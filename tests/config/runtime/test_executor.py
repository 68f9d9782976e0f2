"""``runtime.executor``: its forms, what is merged for a stage, and what is refused with the executor that has it."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.runtime import Runtime
from align.config.runtime.executor import LocalExecutor, RayExecutor, SamplersConfig, SlurmExecutor
from align.config.validation import validate
from align.errors import UserError


def runtime(**fields: Any) -> Runtime:
    return validate(Runtime, fields, "p.yaml: runtime")


def refusal(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        runtime(**fields)
    return str(caught.value)


def test_the_name_alone_is_the_short_form_and_local_the_default() -> None:
    assert runtime().executor == LocalExecutor()
    assert runtime(executor="slurm") == runtime(executor={"name": "slurm"})
    assert runtime(executor="ray").executor == RayExecutor()
    block = {"name": "slurm", "partition": "gpu", "sbatch": {"mail-type": "END"}, "tasks": 9}
    assert runtime(executor=block).executor == SlurmExecutor(partition="gpu", sbatch={"mail-type": "END"}, tasks=9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"executor": "slrum"}, "runtime.executor.name: unknown value 'slrum'. Did you mean 'slurm'?"),
        (
            {"executor": {"name": "ray", "partition": "gpu"}},
            "runtime.executor: 'partition' is a field of slurm, and the executor is ray. Leave it out, or write `name: "
            "slurm`.",
        ),
        (
            {"executor": {"gpus": 1}},
            "runtime.executor: 'gpus' is a field of slurm and ray, and no executor is named. Write `runtime: "
            "{executor: {name: slurm}}`, or run it with --on slurm.",
        ),
        (
            {"executor": {"partiton": "a"}},
            "runtime.executor: unknown key 'partiton'. 'partition' is a field of slurm",
        ),
        (
            {"executor": {"name": "slurm", "partiton": "a"}},
            "runtime.executor: unknown key 'partiton'. Did you mean 'partition'?",
        ),
        ({"executor": {"name": "ray", "cpus": -1}}, "runtime.executor.cpus: should be greater than or equal to 0"),
        (
            {"executor": "ray", "stages": {"ppo": {"executor": {"time": "1:00"}}}},
            "runtime.stages.ppo.executor: 'time' is a field of slurm, and the executor is ray.",
        ),
        ({"stages": {"ppo": {"executor": {"gpus": 4}}}}, "runtime.stages.ppo.executor: 'gpus' is a field of slurm and"),
        ({"executor": {"name": "slurm", "tasks": 9}}, "runtime.executor: with tasks (now 9), the jobs of data builds"),
        (
            {"slurm": {"partition": "gpu"}},
            "runtime: 'slurm' is an executor. Write `executor: {name: slurm, partition: …}`, and leave `slurm` out.",
        ),
        ({"stages": {"ppo": {"ray": {"gpus": 4}}}}, "runtime.stages.ppo: 'ray' is an executor."),
    ],
)
def test_a_wrong_block_is_refused_with_its_place_and_the_remedy(fields: dict[str, Any], message: str) -> None:
    assert refusal(**fields).startswith(f"p.yaml: {message}")


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


def test_a_stage_s_time_limit_is_checked_with_the_run_s_grace() -> None:
    settings = runtime(executor={"name": "slurm", "grace": 600}, stages={"ppo": {"executor": {"time": "00:10:00"}}})
    with pytest.raises(UserError, match=r"^p: runtime.stages.ppo.executor: time 00:10:00 leaves a stage no time"):
        settings.for_stage("ppo", where="p: runtime.stages")


def test_a_block_made_in_python_is_read_again_as_it_was() -> None:
    settings = Runtime(executor=SlurmExecutor(partition="cpu"))
    assert settings.for_stage("any") == settings
    assert validate(Runtime, settings.model_dump(mode="json"), "x") == settings


def test_only_ray_has_samplers() -> None:
    assert runtime(executor={"name": "ray", "samplers": {"count": 4}}).samplers.count == 4
    assert runtime(executor="slurm").samplers == SamplersConfig()
