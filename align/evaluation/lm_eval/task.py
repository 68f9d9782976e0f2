"""Benchmarks that run through lm-eval: any of its tasks, or your tasks in its YAML format.

lm-eval loads each system's checkpoint in a separate process and runs it there, with its own prompts, few-shot
examples and filters, so the numbers equal its command line's. An entry may name several tasks: a metric's
name begins with lm-eval's name of the task, ``arc_easy_acc_norm``. Tasks that run code written by the model are
refused. The answers' text stays in lm-eval.

The process is separate for three reasons: a process can hold only one vLLM, lm-eval seeds and patches the process it
runs in, and the end of a process frees all its memory. A process that neither prints nor computes for too long is
killed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from align.config.stages.evaluation.tasks import LmEvalConfig
from align.config.user_paths import matching_paths, user_path
from align.data.rows import user
from align.errors import UserError
from align.evaluation.answers import Item, Measured
from align.evaluation.lm_eval.columns import Column, MissingValuesError, NotAMeanError, column_name, columns, numbers
from align.evaluation.lm_eval.worker import JOB, RESULT, SEEDS
from align.evaluation.scorecard import SystemInfo
from align.evaluation.tasks.base import Task, TaskInputs
from align.models.chat.render import render_prompt
from align.models.chat.template_settings import stored_settings
from align.store.fingerprint import digest, file_digest
from align.store.json_files import DamagedFile, parse_object, write_text_atomically

if TYPE_CHECKING:
    from align.evaluation.participants import Reader

DESCRIBE_TIMEOUT = 600.0
"""Seconds without output or CPU time from lm-eval while it loads tasks; a download has a progress bar."""
MODULE = "align.evaluation.lm_eval.worker"
POLL_SECONDS = 0.1
LOG_LINES = 15
"""Last lines of the log that an error shows."""
BUSY_CPU_SECONDS = 5.0
"""CPU time that counts as work while the process is silent; less may be a process that waits for something."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def identities(config: LmEvalConfig, base: Path) -> dict[str, str]:
    """Return lm-eval's version, and digests of the files of ``include`` and the data files that its tasks name."""
    digests = {"lm_eval": lm_eval_version()}
    if config.include is not None:
        folder = _include_folder(config, base)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
        digests["include"] = digest({str(path.relative_to(folder)): file_digest(path) for path in files})
        # Files of data may be anywhere; their contents decide the numbers as much as the YAML.
        data = sorted({path for file in files if file.name.endswith("yaml") for path in _data_files(file, base)})
        if data:
            digests["data"] = digest([file_digest(path) for path in data])
    return digests


def build(name: str, config: LmEvalConfig, inputs: TaskInputs) -> LmEvalTask:
    """Have lm-eval load the tasks. Raises ``UserError`` if it is not installed or cannot load them."""
    lm_eval_version()
    if config.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("the backend vllm is not installed; install it, or write `backend: hf`.")
    folder = None if config.include is None else str(_include_folder(config, inputs.base))
    job = {
        "do": "describe",
        "tasks": config.tasks,
        "include": folder,
        "limit": config.limit,
        "revisions": config.revisions,
    }
    return LmEvalTask(name, config, inputs, folder, run_lm_eval(job, inputs.base, DESCRIBE_TIMEOUT))


def _include_folder(config: LmEvalConfig, base: Path) -> Path:
    folder = user_path(str(config.include), base).resolve()
    if not folder.is_dir():
        raise UserError(f"include: there is no folder '{folder}'; relative paths start at the current directory.")
    return folder


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's YAML without importing the functions it names."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _data_files(file: Path, base: Path) -> Iterator[Path]:
    """Yield local data files that a task's YAML names; lm-eval itself reports missing ones.

    Raises ``UserError`` for YAML that does not parse, which lm-eval skips silently.
    """
    try:
        block = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"include: {file} is no YAML: {' '.join(str(error).split())}. Repair it, or move it.") from None
    if not isinstance(block, dict):
        return
    arguments = dict(block.get("dataset_kwargs") or {})
    path_texts = [arguments.get("data_files"), arguments.get("data_dir")]
    for text in (str(block.get("dataset_path", "")), *_leaf_texts(path_texts)):
        if not text:
            continue
        for path in matching_paths(text, base):
            if path.is_dir():
                yield from (inner for inner in path.rglob("*") if inner.is_file())
            else:
                yield path


def _leaf_texts(value: Any) -> Iterator[str]:
    """Yield the texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaf_texts(part)


class LmEvalTask(Task):
    """Tasks of lm-eval as one task, which every system's checkpoint runs inside lm-eval."""

    reads = True
    loads_checkpoint = True
    kind = "lm_eval"

    def __init__(
        self, name: str, config: LmEvalConfig, inputs: TaskInputs, folder: str | None, described: dict[str, Any]
    ) -> None:
        """Build the task from ``described``, the result of ``worker.describe``."""
        self.name = name
        self.config = config
        self.inputs = inputs
        self.folder = folder
        self.described = described
        self.title = f"lm-eval: {', '.join(config.tasks)}"
        tasks = described["tasks"]
        documents = [(task, doc) for task, entry in tasks.items() for doc in entry["docs"]]
        self.items = [
            Item(f"{task}/{doc['id']}", task, [user(doc["text"])], {"hash": doc["hash"]}) for task, doc in documents
        ]
        self.order = {(task, doc["id"]): index for index, (task, doc) in enumerate(documents)}
        self.columns, self.left_out = columns(described)
        if not self.columns:
            raise UserError(f"no metric of {', '.join(tasks)} is a mean over documents, so nothing could be compared.")
        self.metrics = {column.name: column.metric() for column in self.columns}
        self.primary = self.columns[0].name
        if self.left_out:
            reasons = "; ".join(f"{metric}: {reason}" for metric, reason in sorted(self.left_out.items()))
            inputs.warn(
                f"tasks.{name}: lm-eval's numbers without one for each question are in the notes only. {reasons}"
            )

    def settings(self) -> dict[str, Any]:
        """Return lm-eval's version, the tasks' digests and the options they run with."""
        tasks = {
            task: {
                "version": described["version"],
                "config": described["config"],
                "data": described["data"],
                "questions": len(described["docs"]),
                "docs": digest([doc["hash"] for doc in described["docs"]]),
            }
            for task, described in self.described["tasks"].items()
        }
        return {
            "lm_eval": self.described["version"],
            "tasks": tasks,
            **self.config.model_dump(
                mode="json", include={"revisions", "backend", "shots", "chat", "limit", "max_length"}
            ),
            "gen_kwargs": dict(self.config.gen_kwargs),
            "precision": self.inputs.precision,
            "seeds": SEEDS,
        }

    def read(self, reader: Reader) -> Measured:
        """Run one checkpoint inside lm-eval. Raises ``RuntimeError`` with the end of lm-eval's log if it failed."""
        info = reader.info
        if info.system and self.config.chat:
            # lm-eval silently drops the system message if a template refuses it; rendering it here raises.
            render_prompt(reader.tokenizer, [{"role": "system", "content": info.system}, user("?")])
        identity = {
            **self.settings(),
            # Functions next to the tasks' YAML, and the modules they call, also change the numbers.
            "files": identities(self.config, self.inputs.base),
            "asked": self.config.tasks,
            "system": info.system,
            "shots": self._shots(info),
        }
        results = reader.cached(f"lm_eval-{self.name}", identity, lambda: self._run(reader))
        return self._measured(results, info)

    def _shots(self, info: SystemInfo) -> int | None:
        return info.shots or self.config.shots

    def _run(self, reader: Reader) -> dict[str, Any]:
        config = self.config
        runtime = reader.runtime
        job = {
            "do": "evaluate",
            **config.model_dump(mode="json", exclude={"task", "include", "shots"}),
            "include": self.folder,
            "shots": self._shots(reader.info),
            "system": reader.info.system,
            "model_dir": str(reader.model_dir.resolve()),
            "template": stored_settings(reader.tokenizer.chat_template),
            "precision": self.inputs.precision,
            "device": _device(runtime.device),
            "engine": runtime.engine.model_dump(mode="json") | {"gpu_memory": runtime.engine.gpu_share},
        }
        return run_lm_eval(job, self.inputs.base, runtime.engine.timeout)

    def _measured(self, results: dict[str, Any], info: SystemInfo) -> Measured:
        self._check_questions(results)
        self._add_new_columns(results)
        measured = Measured({}, notes={"shots": results["shots"]})
        # Over a copy, since ``_drop`` removes columns from the list.
        for column in list(self.columns):
            try:
                values, weights = numbers(column, results, self.order)
            except MissingValuesError:
                self._drop(column, "lm-eval gave no values")
                continue
            except NotAMeanError:
                self._drop(column, "no mean over documents")
                continue
            measured.values[column.name] = [[value] for value in values]
            if set(weights) != {1.0}:
                measured.weights[column.name] = weights
        if self.left_out:
            measured.notes["left_out"] = dict(self.left_out)
            measured.notes["aggregates"] = results["aggregates"]
        differing = []
        if info.shots:
            differing = sorted(task for task, shots in results["shots"].items() if shots != info.shots)
        if differing:
            self.inputs.warn(
                f"tasks.{self.name}: {', '.join(differing)} fix their number of examples: {info.name} was shown "
                f"{results['shots'][differing[0]]} rather than {info.shots}"
            )
        return measured

    def _check_questions(self, results: dict[str, Any]) -> None:
        """Raise ``RuntimeError`` if lm-eval ran on other questions than it described: its data changed on disk."""
        for task, described in self.described["tasks"].items():
            # By hash: lm-eval numbers its documents, and the same number may mean another question later.
            if {str(doc["id"]): doc["hash"] for doc in described["docs"]} != results["hashes"].get(task):
                raise RuntimeError(
                    f"lm-eval asked other questions of {task} than it described; its data have changed. Run again."
                )

    def _add_new_columns(self, results: dict[str, Any]) -> None:
        """Add metrics that a task names only while it scores (pass@1 of pass_at_k)."""
        existing = {(task, column.key) for column in self.columns for task in column.tasks}
        grouped = {task for column in self.columns if column.by_size is not None for task in column.tasks}
        for task, keys in results["values"].items():
            described = self.described["tasks"][task]
            described_metrics = {entry["metric"] for entry in described["metrics"]}
            for key in keys:
                metric, _, filter_name = key.partition(",")
                if (task, key) in existing or metric in described_metrics or task in grouped:
                    continue
                name = column_name(task, metric, filter_name, described["filters"])
                column = Column(name, task, key, (task,), "custom", results["better"][task].get(metric))
                self.columns.append(column)
                self.metrics[column.name] = column.metric()

    def _drop(self, column: Column, reason: str) -> None:
        self.left_out[f"{column.of} {column.key}"] = reason
        self.columns.remove(column)
        del self.metrics[column.name]
        self.inputs.warn(
            f"tasks.{self.name}: {column.name} is left out ({reason}); lm-eval's own number is in the notes"
        )
        if column.name == self.primary and self.columns:
            self.primary = self.columns[0].name


def _device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def lm_eval_version() -> str:
    """Return the installed version. Raises ``UserError`` if lm-eval is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "tasks of the kind lm_eval need lm-eval, which is not installed: "
            "`pip install 'align-pipeline[evaluation]'`."
        ) from None


def run_lm_eval(job: Mapping[str, Any], base: Path, idle_timeout: float) -> dict[str, Any]:
    """Run ``job`` (see ``worker.py``) and return its result; relative paths in tasks start at ``base``.

    Raises ``UserError`` for a mistake in the settings, and ``RuntimeError`` with the end of the log if the process
    failed, or neither printed nor computed anything for ``idle_timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="align-lm-eval-") as name:
        folder = Path(name)
        log = folder / "log.txt"
        result = folder / RESULT
        # The worker watches ``parent``, so it does not outlive a stage that was killed.
        write_text_atomically(folder / JOB, json.dumps({**job, "parent": os.getpid()}))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=base,
                env=_environment(),
            )
        try:
            is_stuck = _wait(process, log, idle_timeout)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if is_stuck:
            raise RuntimeError(
                f"lm-eval did nothing for {idle_timeout:g} s and was killed (runtime.engine.timeout).{log_end(log)}"
            )
        if process.returncode != 0 or not result.is_file():
            raise RuntimeError(f"lm-eval ended with exit code {process.returncode}.{log_end(log)}")
        try:
            reply = parse_object(result.read_bytes())
        except DamagedFile as error:
            raise RuntimeError(f"lm-eval's result {error}.{log_end(log)}") from None
    if "refused" in reply:
        raise UserError(reply["refused"])
    return reply


def _wait(process: subprocess.Popen[bytes], log: Path, idle_timeout: float) -> bool:
    """Wait for the process; return True if it was idle for ``idle_timeout`` seconds and still runs.

    The log is not enough evidence: a batch of long answers prints no line for minutes, on a busy machine for many.
    """
    log_size = -1
    cpu_seconds = 0.0
    active_at = time.monotonic()
    while process.poll() is None:
        # Output or CPU time since the last look is a sign of life.
        size = log.stat().st_size
        seconds = _cpu_seconds(process.pid)
        if size != log_size or seconds > cpu_seconds + BUSY_CPU_SECONDS:
            log_size = size
            cpu_seconds = seconds
            active_at = time.monotonic()
        elif time.monotonic() - active_at > idle_timeout:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def log_end(log: Path) -> str:
    """Return the end of the log without progress bars, for an error; empty for an empty log."""
    text = log.read_bytes()[-65536:].decode("utf-8", "replace").replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and "%|" not in line and "it/s" not in line]
    return "\nThe end of its log:\n" + "\n".join(lines[-LOG_LINES:]) if lines else ""


def _environment() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    paths = [str(Path(__file__).resolve().parents[3]), variables.get("PYTHONPATH", "")]
    # The process starts in another folder, in which a relative path to align would not hold.
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return {"LMEVAL_LOG_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false", **variables}
