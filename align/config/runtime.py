"""Where and how a pipeline runs: the block ``runtime``, which is never part of a key. Torch-free."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.config.faults import REMEDIES
from align.config.launch import LaunchConfig
from align.config.scheduler import RayConfig, SlurmConfig
from align.config.validation import suggest, validate
from align.config.vllm_servers import RolloutsConfig, refuse_moved
from align.store.object_store import check_address


class EngineConfig(Config):
    """How responses are sampled. Changes speed and memory; samples come from the same distribution."""

    name: Literal["auto", "vllm", "transformers"] = "auto"
    """``auto`` takes vLLM where it imports, else transformers, and says which; for servers see ``rollouts``."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of the engine; ``auto`` follows the stage's ``precision``."""
    gpu_memory: float = Field(0.35, gt=0, le=0.95)
    """Share of each GPU's memory that vLLM may take."""
    sleep: bool = True
    """On a GPU, ``vllm`` leaves its memory to the trainer between rollouts, for a copy of the weights each way."""
    cpu_kv_cache_gb: float = Field(1.0, gt=0)
    """GiB of key-value cache on a CPU."""
    compile: bool = False
    """Compile the engine's graphs: 85 s at start on a CPU, about 1.3 times the speed afterwards."""
    batch_size: int = Field(128, ge=1)
    """Sequences decoded at once."""
    timeout: float = Field(600, gt=0)
    """Seconds that an engine may take to start, to load weights, to answer; then the stage fails and can be resumed.

    In this process only seconds without progress count: no token, no tensor. The default is generous because a healthy
    call can be quiet for minutes (85 s of compiling on two idle cores, weights from a network disk) and a stage that is
    ended for nothing costs an update, while one that hangs costs the night.
    """

    @model_validator(mode="before")
    @classmethod
    def _servers_moved(cls, given: Any) -> Any:
        return refuse_moved(given)


class ExecutorConfig(Config):
    """What does the shards of data builds. ``executor: slurm`` is short for ``executor: {name: slurm}``."""

    name: Literal["local", "slurm", "ray"] = "local"
    """``local``: ``workers`` processes here. ``slurm`` and ``ray``: jobs of a cluster, through datatrove."""
    tasks: int = Field(100, ge=1)
    """Jobs of a pass at most; each does its share of the shards."""
    cpus: int = Field(1, ge=1)
    """Cores of a job."""
    gpus: int = Field(0, ge=0)
    """GPUs of a job, for steps that run a model."""
    memory_gb: int = Field(4, ge=1)
    """GiB for each core."""
    partition: str | None = None
    """Slurm's partition."""
    time: str = Field("04:00:00", pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$")
    """Slurm's time limit of a job, hours:minutes:seconds."""
    qos: str | None = None
    """Slurm's quality of service, where the cluster asks for one."""
    setup: str | None = None
    """Shell commands that make this program's environment ready on a node; by default its folder goes into the PATH."""
    sbatch: dict[str, str] = Field({})
    """Further options of sbatch: ``{account: nlp}``."""

    @model_validator(mode="after")
    def _slurm_needs_a_partition(self) -> ExecutorConfig:
        if self.name == "slurm" and self.partition is None:
            raise ValueError("executor slurm needs a partition: `executor: {name: slurm, partition: cpu}`")
        return self


class TrackingConfig(Config):
    """Where experiment trackers put a run. Addresses and keys come from their own environment variables, never here."""

    project: str | None = Field(None, min_length=1, max_length=120)
    """Project of wandb and trackio, experiment of mlflow; by default the pipeline's name."""
    folder: str = "tracking"
    """Folder of what trackers write on this machine; a relative one starts at the current folder."""


class StoreConfig(Config):
    """Where artifacts are kept, and how long one waits for what is away (docs/store.md)."""

    folder: str | None = None
    """Folder of the artifacts; ``--store`` and ``$ALIGN_STORE`` come first, ``./store`` last."""
    remote: str | None = None
    """Bucket that finished stages are fetched from and put into, s3://bucket/prefix; ``--store`` takes it, too."""
    lease: float = Field(120.0, ge=1)
    """Seconds of silence after which a machine that holds a stage's lock counts as dead, and another takes over."""
    patience: float = Field(300.0, ge=0)
    """Seconds that a folder or a bucket which does not answer is tried before the run ends or goes on without."""

    @field_validator("remote")
    @classmethod
    def _an_address(cls, given: str | None) -> str | None:
        return given if given is None else check_address(given)


class HandoverConfig(Config):
    """The look at every checkpoint that one stage hands to the next (docs/methods.md)."""

    waive: list[str] = Field([])
    """Faults, by name, that are meant: they refuse nothing."""

    @field_validator("waive")
    @classmethod
    def _known_names(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in REMEDIES:
                raise ValueError(f"there is no fault '{name}'.{suggest(name, REMEDIES)}")
        return names


class StageRuntime(Config):
    """What differs for one stage. What is not said here is as ``runtime`` says, field by field inside a block too."""

    device: Literal["auto", "cpu", "cuda"] | None = None
    """Instead of ``runtime.device``."""
    threads: int | None = Field(None, ge=1)
    """Instead of ``runtime.threads``."""
    engine: EngineConfig | None = None
    """Fields that are other than in ``runtime.engine``."""
    rollouts: RolloutsConfig | None = None
    """Fields that are other than in ``runtime.rollouts``."""
    launch: LaunchConfig | None = None
    """Fields that are other than in ``runtime.launch``."""
    slurm: SlurmConfig | None = None
    """Fields that are other than in ``runtime.slurm``."""
    ray: RayConfig | None = None
    """Fields that are other than in ``runtime.ray``."""


class Runtime(Config):
    """Where and how a pipeline runs. Never part of a key: the same results are found whatever it says."""

    store: StoreConfig = StoreConfig()
    """Where the artifacts are; ``store: FOLDER`` is short for its folder, ``store: s3://…`` for its remote."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA where torch has it."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per process; by default the cores there are, shared out among a stage's processes."""
    workers: int | None = Field(None, ge=1)
    """Processes that build data; by default the cores there are."""
    executor: ExecutorConfig = ExecutorConfig()
    """What does the shards of data builds: ``local``, ``slurm`` or ``ray``."""
    slurm: SlurmConfig = SlurmConfig()
    """What each stage's job asks of Slurm under ``--on slurm``."""
    ray: RayConfig = RayConfig()
    """What each stage's task asks of Ray under ``--on ray``."""
    engine: EngineConfig = EngineConfig()
    """Engine that samples responses, and its share of the machine."""
    rollouts: RolloutsConfig = RolloutsConfig()
    """vLLM servers that sample instead of the engine in the stage's own process."""
    launch: LaunchConfig = LaunchConfig()
    """Processes of every stage that trains; a stage's own under ``stages`` (docs/distributed.md)."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field([])
    """Trackers that get each stage's curves and scores while it runs, beside the report (docs/evaluation.md)."""
    tracking: TrackingConfig = TrackingConfig()
    """Where those trackers put them."""
    handover: HandoverConfig = HandoverConfig()
    """What of the look at checkpoints between stages is waived."""
    stages: dict[str, StageRuntime] = Field({})
    """What differs for one stage, by its name: ``{ppo: {threads: 4}}``. A name in a loop means every round's stage."""

    @field_validator("rollouts")
    @classmethod
    def _servers_fit(cls, rollouts: RolloutsConfig) -> RolloutsConfig:
        rollouts.refuse_unfit()
        return rollouts

    @model_validator(mode="after")
    def _one_engine(self) -> Runtime:
        if self.rollouts.pooled and self.engine.name == "transformers":
            raise ValueError(
                "rollouts names servers of vLLM, but engine.name is transformers, which samples in the stage's "
                "process. Leave one of them out."
            )
        return self

    def with_transformers(self) -> Runtime:
        """The same, but sampled with transformers in the stage's own process."""
        engine = self.engine.model_copy(update={"name": "transformers"})
        return self.model_copy(update={"engine": engine, "rollouts": RolloutsConfig()})

    @field_validator("store", mode="before")
    @classmethod
    def _folder_alone(cls, given: Any) -> Any:
        return {"remote" if "://" in given else "folder": given} if isinstance(given, str) else given

    @field_validator("launch")
    @classmethod
    def _launch_fits_together(cls, launch: LaunchConfig) -> LaunchConfig:
        objection = launch.objection()
        if objection is not None:
            raise ValueError(objection)
        return launch

    @field_validator("executor", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        names = [given] if isinstance(given, str) else given
        plain = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return list(dict.fromkeys(names)) if plain else names

    def for_stage(self, *names: str, where: str = "runtime.stages") -> Runtime:
        """What holds for a stage that goes by one of ``names``, the first that ``stages`` knows; it has no ``stages``.

        Raises ``UserError``, its place below ``where``, if the stage's own fields do not go with the run's.
        """
        said = self.model_dump(exclude_unset=True, exclude={"stages"})
        name = next((name for name in names if name in self.stages), None)
        if name is None:
            return self.model_copy(update={"stages": {}})
        return validate(Runtime, _over(said, self.stages[name].model_dump(exclude_unset=True)), f"{where}.{name}")


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` with what ``above`` says; blocks field by field, and a null says nothing."""
    found = dict(below)
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] = _over(found[name], value)
        elif value is not None:
            found[name] = value
    return found
