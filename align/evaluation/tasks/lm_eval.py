"""Benchmarks that run through lm-eval: any of its tasks, or tasks of the user's own in its YAML format.

Each system's checkpoint is loaded by lm-eval, in a process of its own, and answers there: with lm-eval's prompts,
few-shot examples and filters, so that the numbers are those of its command line. An entry may have several tasks: a
metric's name begins with lm-eval's name of the task, ``arc_easy_acc_norm``. Left out: tasks that run code which the
model wrote, and the answers' text, which stays in lm-eval.
"""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from align.config.user_paths import user_path
from align.data.rows import user
from align.errors import UserError
from align.evaluation.lm_eval_process import lm_eval_version, run_lm_eval
from align.evaluation.lm_eval_run import SEEDS
from align.evaluation.lm_eval_values import Column, Missing, NotAMean, column_name, columns, numbers
from align.evaluation.tasks.base import Given, Item, Measured, Reader, SystemInfo, Task, TaskConfig
from align.models.render import render_prompt
from align.store.fingerprint import digest, file_digest

QUIET_SECONDS = 600.0
"""Without a word from lm-eval while it loads tasks; a download has a progress bar."""


class LmEvalConfig(TaskConfig):
    """Tasks of lm-eval, and how it asks."""

    task: Literal["lm_eval"] = "lm_eval"
    tasks: list[str] = Field(min_length=1)
    """Names of its tasks or groups (``arc_easy``, ``mmlu``; `lm-eval ls tasks` lists them), or of your own."""
    include: str | None = None
    """Folder of tasks of your own in lm-eval's YAML format; relative to the current directory, as paths in it are."""
    revisions: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]] = Field({})
    """Commits of the datasets that the tasks read from the Hub: ``allenai/ai2_arc: <40 hexadecimal digits>``."""
    backend: Literal["hf", "vllm"] = "hf"
    """What computes inside lm-eval. Their numbers differ in the last digits: one for all that is compared."""
    shots: int | None = Field(None, ge=0, le=64)
    """Solved examples before each question, lm-eval's own; by default what each task says, else none."""
    chat: bool = False
    """Ask through the checkpoint's chat template: for instructed models. Base models and most published numbers of
    multiple-choice tasks go without."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many questions of each task; fewer make wider intervals."""
    batch_size: int = Field(8, ge=1)
    """Sequences in one pass of ``hf``; vLLM batches by itself (``runtime.engine.batch_size``)."""
    max_length: int | None = Field(None, ge=2)
    """Longest question with its answer, in tokens; a longer one loses its beginning. By default the model's own."""
    gen_kwargs: dict[str, bool | int | float | str | list[str]] = Field({})
    """Overrides how answers are sampled: ``{max_gen_toks: 256}``, ``{do_sample: true, temperature: 0.7}``."""

    identified: ClassVar[frozenset[str]] = frozenset({"include"})

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks names one twice; name each once")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """lm-eval's version, the files of ``include``, and the data files that its tasks name."""
        found = {"lm_eval": lm_eval_version()}
        if self.include is not None:
            folder = self._folder(base)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
            found["include"] = digest({str(path.relative_to(folder)): file_digest(path) for path in files})
            data = sorted({path for file in files if file.name.endswith("yaml") for path in _data_files(file, base)})
            if data:
                found["data"] = digest([file_digest(path) for path in data])
        return found

    def build(self, name: str, given: Given) -> LmEvalTask:
        """Have lm-eval load the tasks; raises ``UserError`` where it is not installed, or cannot."""
        lm_eval_version()
        if self.backend == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError("the backend vllm is not installed; install it, or write `backend: hf`.")
        folder = None if self.include is None else str(self._folder(given.base))
        job = {
            "do": "describe",
            "tasks": self.tasks,
            "include": folder,
            "limit": self.limit,
            "revisions": self.revisions,
        }
        return LmEvalTask(name, self, given, folder, run_lm_eval(job, given.base, QUIET_SECONDS))

    def _folder(self, base: Path) -> Path:
        folder = user_path(str(self.include), base).resolve()
        if not folder.is_dir():
            raise UserError(f"include: there is no folder '{folder}'; relative paths start at the current directory.")
        return folder


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's YAML without importing the functions it names."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _data_files(file: Path, base: Path) -> Iterator[Path]:
    """Local data files that a task's YAML names; what is not there is lm-eval's to complain about.

    Raises ``UserError`` for YAML that does not parse, which lm-eval passes over without a word.
    """
    try:
        block = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"include: {file} is no YAML: {' '.join(str(error).split())}. Repair it, or move it.") from None
    if not isinstance(block, dict):
        return
    named = dict(block.get("dataset_kwargs") or {})
    texts = [str(block.get("dataset_path", ""))]
    waiting: list[Any] = [named.get("data_files"), named.get("data_dir")]
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        texts += [part] if isinstance(part, str) else []
    for text in texts:
        for place in map(Path, glob.glob(str(user_path(text, base)), recursive=True)) if text else ():
            yield from (path for path in place.rglob("*") if path.is_file()) if place.is_dir() else (place,)


class LmEvalTask(Task):
    """Reads: every system's checkpoint answers inside lm-eval."""

    reads = True
    kind = "lm_eval"

    def __init__(
        self, name: str, config: LmEvalConfig, given: Given, folder: str | None, described: dict[str, Any]
    ) -> None:
        self.name, self.config, self.given, self.folder, self.described = name, config, given, folder, described
        self.title = f"lm-eval: {', '.join(config.tasks)}"
        tasks = described["tasks"]
        self.items = [
            Item(f"{task}/{doc['id']}", task, [user(doc["text"])], {"hash": doc["hash"]})
            for task, one in tasks.items()
            for doc in one["docs"]
        ]
        self.order = {(task, doc["id"]): at for at, (task, doc) in enumerate(_documents(tasks))}
        self.columns, self.left_out = columns(described)
        if not self.columns:
            raise UserError(f"no metric of {', '.join(tasks)} is a mean over documents, so nothing could be compared.")
        self.metrics = {column.name: column.shown() for column in self.columns}
        self.primary = self.columns[0].name
        if self.left_out:
            told = "; ".join(f"{metric}: {why}" for metric, why in sorted(self.left_out.items()))
            given.warn(f"tasks.{name}: lm-eval's numbers without one for each question are in the notes only. {told}")

    def settings(self) -> dict[str, Any]:
        """See the base."""
        of_tasks = {
            task: {
                "version": one["version"],
                "config": one["config"],
                "data": one["data"],
                "questions": len(one["docs"]),
                "docs": digest([doc["hash"] for doc in one["docs"]]),
            }
            for task, one in self.described["tasks"].items()
        }
        return {
            "lm_eval": self.described["version"],
            "tasks": of_tasks,
            **self.config.model_dump(
                mode="json", include={"revisions", "backend", "shots", "chat", "limit", "max_length"}
            ),
            "gen_kwargs": dict(self.config.gen_kwargs),
            "precision": self.given.precision,
            "seeds": SEEDS,
        }

    def read(self, reader: Reader) -> Measured:
        """See the base. Raises ``RuntimeError`` with the end of lm-eval's log where it failed."""
        info = reader.info
        if info.system and self.config.chat:
            # lm-eval leaves the system message out where a template refuses it, and says so to nobody.
            render_prompt(reader.tokenizer, [{"role": "system", "content": info.system}, user("?")])
        identity = {
            **self.settings(),
            "files": self.config.identities(self.given.base),  # functions beside the tasks' YAML, and what they call
            "asked": self.config.tasks,
            "system": info.system,
            "shots": self._shots(info),
        }
        found = reader.kept(f"lm_eval-{self.name}", identity, lambda: self._run(reader))
        return self._measured(found, info)

    def _shots(self, info: SystemInfo) -> int | None:
        return info.shots or self.config.shots

    def _run(self, reader: Reader) -> dict[str, Any]:
        config, runtime = self.config, reader.runtime
        job = {
            "do": "evaluate",
            **config.model_dump(mode="json", exclude={"task", "include", "shots"}),
            "include": self.folder,
            "shots": self._shots(reader.info),
            "system": reader.info.system,
            "model_dir": str(reader.model_dir.resolve()),
            "precision": self.given.precision,
            "device": _device(runtime.device),
            "engine": runtime.engine.model_dump(mode="json"),
        }
        return run_lm_eval(job, self.given.base, runtime.engine.timeout)

    def _measured(self, found: dict[str, Any], info: SystemInfo) -> Measured:
        self._same_questions(found)
        self._notice_new(found)
        measured = Measured({}, notes={"shots": found["shots"]})
        for column in list(self.columns):
            try:
                values, weights = numbers(column, found, self.order)
            except (Missing, NotAMean) as error:
                self._drop(column, "lm-eval gave no values" if isinstance(error, Missing) else "no mean over documents")
                continue
            measured.values[column.name] = [[value] for value in values]
            if set(weights) != {1.0}:
                measured.weights[column.name] = weights
        if self.left_out:
            measured.notes["left_out"] = dict(self.left_out)
            measured.notes["aggregates"] = found["aggregates"]
        asked = info.shots
        other = sorted(task for task, shots in found["shots"].items() if asked and shots != asked)
        if other:
            self.given.warn(
                f"tasks.{self.name}: {', '.join(other)} fix their number of examples: {info.name} was shown "
                f"{found['shots'][other[0]]} rather than {asked}"
            )
        return measured

    def _same_questions(self, found: dict[str, Any]) -> None:
        """Numbers belong to the questions that were described, whatever has changed on disk since."""
        for task, one in self.described["tasks"].items():
            if {str(doc["id"]): doc["hash"] for doc in one["docs"]} != found["hashes"].get(task):
                raise RuntimeError(
                    f"lm-eval asked other questions of {task} than it described; its data have changed. Run again."
                )

    def _notice_new(self, found: dict[str, Any]) -> None:
        """Metrics that a task names only while it scores (pass@1 of pass_at_k)."""
        known = {(task, column.key) for column in self.columns for task in column.tasks}
        grouped = {task for column in self.columns if column.by_size is not None for task in column.tasks}
        for task, keys in found["values"].items():
            described = {one["metric"] for one in self.described["tasks"][task]["metrics"]}
            for key in keys:
                metric, _, chosen = key.partition(",")
                if (task, key) in known or metric in described or task in grouped:
                    continue
                name = column_name(task, metric, chosen, self.described["tasks"][task]["filters"])
                column = Column(name, task, key, (task,), "custom", found["better"][task].get(metric))
                self.columns.append(column)
                self.metrics[column.name] = column.shown()

    def _drop(self, column: Column, why: str) -> None:
        self.left_out[f"{column.of} {column.key}"] = why
        self.columns.remove(column)
        del self.metrics[column.name]
        self.given.warn(f"tasks.{self.name}: {column.name} is left out ({why}); lm-eval's own number is in the notes")
        if column.name == self.primary and self.columns:
            self.primary = self.columns[0].name


def _documents(tasks: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for task, one in tasks.items():
        for doc in one["docs"]:
            yield task, doc


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
