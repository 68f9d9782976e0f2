"""The block ``runtime``: where and how a pipeline runs. It is never part of a key. Torch-free."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.config.runtime.executor import (
    Executor,
    LocalExecutor,
    RayExecutor,
    SamplersConfig,
    SlurmExecutor,
    name_in,
    name_of_stages,
    refuse_moved_blocks,
)
from align.config.runtime.launch import LaunchConfig
from align.config.runtime.rollouts import RolloutsConfig, refuse_moved
from align.config.validation import suggest, validate
from align.store.object_store import check_address

FAULT_REMEDIES: dict[str, str] = {
    "weights-truncated": "Copy the files again, or have the stage that made them run again with --rebuild.",
    "weights-not-finite": "Train again with a lower learning rate, or from an earlier checkpoint; nothing can be "
    "learned from these.",
    "weights-dtype": "Take the checkpoint in float32, bfloat16 or float16, as its stage wrote it.",
    "vocabulary-size": "Take weights and tokenizer of one model; resize_token_embeddings gives added tokens rows.",
    "score-head": "Point at the output of a reward stage, and keep its files together.",
    "wrong-kind": "A policy writes (...ForCausalLM), a reward model scores (...ForSequenceClassification): point at "
    "the stage that makes what is wanted.",
    "adapter-base": "Name the base that the adapter was trained on.",
    "template-changed": "Put the chat template back, or give it to the `model` stage (`chat_template`) and train again "
    "from there, so that every checkpoint learns it.",
    "thinking-changed": "Remove `thinking` or the switch in `chat_template_kwargs` from this stage, or train with the "
    "same setting.",
    "tokenizer-changed": "Put the tokenizer's files back, or take checkpoints that come from the same base model.",
    "pad-is-eos": "Bring the model in through a `model` stage, or set pad_token to another special token.",
    "eos-not-turn-end": "Bring the model in through a `model` stage, which takes the template's end of turn as eos.",
    "reward-floor": "Give the reward model more or cleaner pairs, or more held-out ones; `reward_floor: null` trains "
    "against it all the same.",
}
"""Faults of checkpoints that one stage hands to the next, with their remedies."""


SERVER_SHARE = 0.35
"""Share of a GPU's memory for vLLM if nothing is known about the other programs on it."""
HostPart = Literal["optimizer", "activations", "base"]
"""A part of training that a process can keep in the machine's memory."""
Block = TypeVar("Block", LocalExecutor, SlurmExecutor, RayExecutor, RolloutsConfig, LaunchConfig)


class EngineConfig(Config):
    """The engine that samples responses. It changes speed and memory, not the distribution of samples."""

    name: Literal["auto", "vllm", "transformers"] = "auto"
    """``auto`` uses vLLM if it is installed, else transformers; for servers see ``rollouts``."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of the engine; ``auto`` follows the stage's ``precision``."""
    gpu_memory: Literal["auto"] | Annotated[float, Field(gt=0, le=0.95)] = "auto"
    """Share of each GPU's memory that vLLM may use. ``auto`` is what the stage leaves free on it; for ``rollouts``,
    whose servers may share a GPU with a trainer, it is 0.35."""
    sleep: bool = True
    """On a GPU, ``vllm`` frees its memory for the trainer between rollouts; this copies the weights twice."""
    cpu_kv_cache_gb: float = Field(1.0, gt=0)
    """GiB of key-value cache on a CPU."""
    compile: bool = False
    """Compile the engine's graphs: 85 s at start on a CPU, then about 1.3 times as fast."""
    batch_size: int = Field(128, ge=1)
    """Most sequences decoded at a time."""
    timeout: float = Field(600, gt=0)
    """Time limit in seconds for an engine to start, to load weights or to answer; then the stage fails, resumable.

    In the stage's own process only seconds without progress count (no new token, no loaded tensor). The default is
    generous because a healthy call can be silent for minutes: 85 s of compiling on two cores, weights on a network
    disk.
    """

    @property
    def gpu_share(self) -> float:
        """``gpu_memory``, or the share of a server if it is ``auto``."""
        return SERVER_SHARE if self.gpu_memory == "auto" else self.gpu_memory

    @model_validator(mode="before")
    @classmethod
    def _refuse_server_fields(cls, value: Any) -> Any:
        return refuse_moved(value)


class TrackingConfig(Config):
    """Experiment trackers. Addresses and keys come only from the trackers' own environment variables."""

    project: str | None = Field(None, min_length=1, max_length=120)
    """Project of wandb and trackio, experiment of mlflow; by default the pipeline's name."""
    folder: str = "tracking"
    """Folder for the trackers' local files; a relative path starts at the current folder."""


class StoreConfig(Config):
    """The store of artifacts, and its timeouts (docs/store.md)."""

    folder: str | None = None
    """Folder of the artifacts. ``--store`` and ``$ALIGN_STORE`` override it; the default is ``./store``."""
    remote: str | None = None
    """Bucket that finished stages are fetched from and uploaded to, s3://bucket/prefix. ``--store`` also accepts it."""
    lease: float = Field(120.0, ge=1)
    """Seconds without a heartbeat after which the holder of a stage's lock counts as dead and another process gets
    it."""
    patience: float = Field(300.0, ge=0)
    """Seconds to retry a folder or bucket that does not answer, before the run fails or continues without it."""

    @field_validator("remote")
    @classmethod
    def _check_remote(cls, remote: str | None) -> str | None:
        return None if remote is None else check_address(remote)


class HandoverConfig(Config):
    """Checks of every checkpoint that one stage hands to the next (docs/methods.md)."""

    waive: list[str] = Field([])
    """Faults to accept, by name."""

    @field_validator("waive")
    @classmethod
    def _check_waived_names(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in FAULT_REMEDIES:
                raise ValueError(f"there is no fault '{name}'.{suggest(name, FAULT_REMEDIES)}")
        return names


class StageRuntime(Config):
    """Overrides for one stage; fields that are not set, also inside blocks, keep the value of ``runtime``."""

    device: Literal["auto", "cpu", "cuda"] | None = None
    """Instead of ``runtime.device``."""
    threads: int | None = Field(None, ge=1)
    """Instead of ``runtime.threads``."""
    engine: EngineConfig | None = None
    """Overrides of ``runtime.engine``, field by field."""
    rollouts: RolloutsConfig | None = None
    """Overrides of ``runtime.rollouts``, field by field."""
    launch: LaunchConfig | None = None
    """Overrides of ``runtime.launch``, field by field."""
    offload: Literal["auto"] | list[HostPart] | None = None
    """Instead of ``runtime.offload``."""
    keep_state: Literal["auto"] | bool | None = None
    """Instead of ``runtime.keep_state``."""
    shared_prefixes: bool | None = None
    """Instead of ``runtime.shared_prefixes``."""
    executor: Executor | None = None
    """Overrides of ``runtime.executor``, field by field; a data stage may name another executor for its ``tasks``."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_moved_blocks(cls, value: Any) -> Any:
        return refuse_moved_blocks(value)


class Runtime(Config):
    """Machines and engines of a pipeline. Never part of a key, so finished results are found with any setting."""

    store: StoreConfig = StoreConfig()
    """The store; ``store: FOLDER`` is short for its folder, ``store: s3://…`` for its remote."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses CUDA if torch finds it."""
    deterministic: bool = False
    """On a GPU, use only kernels that give equal bits in every run, slower ones among them. vLLM has none, so ``auto``
    samples with transformers. A CPU gives equal bits without it."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per process; by default all cores, divided among a stage's processes."""
    workers: int | None = Field(None, ge=1)
    """Processes that build data; by default one per core."""
    executor: Executor = LocalExecutor()
    """Executor of stages, trials of sweeps and data builds, with the resources of each; ``--on`` selects another."""
    engine: EngineConfig = EngineConfig()
    """Engine that samples responses, and its share of the machine."""
    rollouts: RolloutsConfig = RolloutsConfig()
    """vLLM servers that sample in place of an engine in the stage's own process."""
    launch: LaunchConfig = LaunchConfig()
    """Processes of every stage that trains; override one stage under ``stages`` (docs/distributed.md)."""
    offload: Literal["auto"] | list[HostPart] = "auto"
    """Parts that a stage that trains on one GPU keeps in the machine's memory: ``optimizer``, AdamW's state (paged by
    bitsandbytes); ``activations``, the inputs of recomputed layers; ``base``, frozen weights while vLLM samples.
    ``auto`` chooses the fewest, in this order, with which the stage fits."""
    keep_state: Literal["auto"] | bool = "auto"
    """Keep the trainer's state (optimizer, schedule, position) with each trained checkpoint, for `continue_from`.
    ``auto`` keeps up to 2 GB a stage, and always the state of a stage that another stage continues."""
    shared_prefixes: bool = True
    """Supervised and preference trainers compute real tokens only, and prefixes that rows share once. ``false`` pads
    rows as trl does; results change by rounding."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field([])
    """Trackers that log each stage's curves and scores while it runs (docs/reporting.md)."""
    tracking: TrackingConfig = TrackingConfig()
    """Project and folder of those trackers."""
    handover: HandoverConfig = HandoverConfig()
    """Faults of checkpoints between stages to accept."""
    stages: dict[str, StageRuntime] = Field({})
    """Overrides per stage: ``{ppo: {threads: 4}}``. The name of a stage in a loop means that stage in every round."""

    @model_validator(mode="before")
    @classmethod
    def _name_executors_of_stages(cls, value: Any) -> Any:
        return name_of_stages(refuse_moved_blocks(value))

    @field_validator("executor", "rollouts", "launch")
    @classmethod
    def _check_fields_compatible(cls, block: Block) -> Block:
        objection = block.objection()
        if objection is not None:
            raise ValueError(objection)
        return block

    @model_validator(mode="before")
    @classmethod
    def _choose_deterministic_engine(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("deterministic") is not True:
            return value
        engine = value.get("engine", {})
        is_open = isinstance(engine, dict) and engine.get("name", "auto") == "auto"
        return value | {"engine": engine | {"name": "transformers"}} if is_open else value

    @model_validator(mode="after")
    def _check_deterministic_engine(self) -> Runtime:
        if not self.deterministic:
            return self
        used = {
            "engine.name is vllm": self.engine.name == "vllm",
            "rollouts names servers of vLLM": self.rollouts.pooled,
            "executor.samplers has engines on other machines": self.samplers.count > 0,
        }
        for setting, is_set in used.items():
            if is_set:
                raise ValueError(
                    f"deterministic is true, but {setting}, whose samples may differ between two runs. Sample with "
                    "`engine: {name: transformers}`, or set deterministic to false."
                )
        return self

    @model_validator(mode="after")
    def _check_single_engine(self) -> Runtime:
        if self.rollouts.pooled and self.engine.name == "transformers":
            raise ValueError(
                "rollouts names servers of vLLM, but engine.name is transformers, which samples in the stage's "
                "process. Leave one of them out."
            )
        return self

    @property
    def samplers(self) -> SamplersConfig:
        """Engines on a Ray cluster that sample for a stage; their count is 0 unless the executor is ``ray``."""
        return self.executor.samplers if isinstance(self.executor, RayExecutor) else SamplersConfig()

    @property
    def engine_name(self) -> str:
        """Name of the engine that samples, with ``auto`` resolved by what is installed; neither library is imported."""
        if self.rollouts.pooled:
            return "vllm-server"
        if self.engine.name != "auto":
            return self.engine.name
        return "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"

    @property
    def may_open_vllm(self) -> bool:
        """Return True if a stage that samples opens vLLM in its own process when vLLM is installed."""
        return self.engine.name != "transformers" and not self.rollouts.pooled and self.samplers.count == 0

    def with_transformers(self) -> Runtime:
        """Return the same settings, but with transformers as the engine, in the stage's own process."""
        engine = self.engine.model_copy(update={"name": "transformers"})
        return self.model_copy(update={"engine": engine, "rollouts": RolloutsConfig()})

    @field_validator("store", mode="before")
    @classmethod
    def _read_store_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"remote" if "://" in value else "folder": value}

    @field_validator("report_to", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        are_texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return list(dict.fromkeys(names)) if are_texts else names

    def for_stage(self, *names: str, where: str = "runtime.stages") -> Runtime:
        """Return the settings of one stage: these, with the overrides of the first of ``names`` in ``stages``.

        Raises ``UserError``, its place below ``where``, if the stage's overrides contradict the run's settings.
        """
        # Only what was set: written-out defaults would override each other instead of giving way.
        explicit = self.model_dump(exclude_unset=True, exclude={"stages"})
        name = next((name for name in names if name in self.stages), None)
        if name is None:
            return self.model_copy(update={"stages": {}})
        return validate(Runtime, _merge(explicit, self.stages[name].model_dump(exclude_unset=True)), f"{where}.{name}")


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the overrides; blocks are merged field by field, and a null does not override."""
    merged = dict(base)
    for name, value in overrides.items():
        if name == "executor" and value is not None and name_in(value) != name_in(base.get(name)):
            merged[name] = value  # another executor does not have this executor's fields
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merge(merged[name], value)
        elif value is not None:
            merged[name] = value
    return merged
