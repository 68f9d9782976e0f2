"""Blocks of code in the documents, and how each of them runs as it stands: on tiny models, with few steps.

Files are written under the names in the blocks' first lines. Pipelines become small when they are loaded, so commands,
scripts and fragments are run without a change. What they are given instead is in the tables below.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import Pipeline
from align.cli.main import main
from align.data.checkers import gold
from align.pipeline.pipeline import Pipeline as AnyPipeline
from align.pipeline.registry import STAGES
from tests.support.inference.fake_chat import completion

ROOT = Path(__file__).resolve().parents[2]
Values = dict[str, Any]

FENCE = re.compile(r'^```(\w+)(?: not_run="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w./-]+\.(?:yaml|py))\b")

SUPERVISED = {"max_steps": 2, "batch_size": 4, "max_length": 1024, "max_rows": 16, "eval_rows": 4,
              "lint": {"waive": ["not-utf8"]}}  # fmt: skip
ONLINE = {"updates": 1, "rollout_batch": 4, "samples_per_prompt": 2, "max_tokens": 8, "reward_floor": None}
KINDS = {
    **dict.fromkeys(("sft", "dpo"), SUPERVISED),
    "reward": SUPERVISED,
    **dict.fromkeys(("ppo", "grpo"), ONLINE),
    "sample": {"max_prompts": {"train": 12, "test": 6}, "n": 4, "max_tokens": 8},
    "synthesize": {"max_prompts": {"train": 4, "test": 2}},
    "evaluate": {"max_prompts": 4, "max_tokens": 8},
}
"""Fields of each kind of stage at a size for tests."""
DROPPED = {
    "epochs", "micro_batch_size", "num_mini_batches", "max_prompt_tokens", "gates", "trainer", "revision", "dtype",
    "eval_updates", "eval_prompts", "cut_off_score",
}  # fmt: skip
"""Fields that such a size leaves no room for, or that belong to a model of the Hub."""
HUB_MODELS = ("mistralai/Mistral-7B-v0.1", "Qwen/Qwen3-4B-Instruct-2507", "meta-llama/Llama-3.1-8B-Instruct")
MODELS = dict.fromkeys(("smollm2-135m-instruct", "tiny", *HUB_MODELS), "talker")
"""The folder of a tiny model that says one of a few words, for each model's name."""
SCORES = {"gold": "tests.support.documents:nearly_gold"}
"""What `sample` scores by: a model of few words earns no gold, and equal scores make no pairs."""
STYLES = {"short", "letters", "brevity"}
"""Scores that compare with no answer, for rows that have none."""
WORDS = {"sweep": ["--trials", "2"], "eval": ["--set", "max_tokens=8"], "export": ["--no-check"]}
"""What commands get in addition."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    page: str
    line: int
    language: str
    reason: str
    """Why it is not run, or an empty text."""
    text: str

    @property
    def file(self) -> str | None:
        """The file that its first line names."""
        match = FILE.match(self.text)
        return match and match.group(1)


def read_blocks(page: str) -> list[Block]:
    """Return a document's blocks of YAML, Python and shell commands."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match.group(1), match.group(2) or "", match.group(3))
        for match in FENCE.finditer(text)
    ]


def nearly_gold(rows: list[Values], responses: list[str]) -> list[float]:
    """Return the gold scores, and a little that differs from text to text."""
    scores = gold(rows, responses)
    return [max(score, 0.001 * (sum(map(ord, text)) % 10)) for score, text in zip(scores, responses, strict=True)]


def answer(body: Values) -> Values:
    """Answer as a model does, or in the form that is asked for as a judge who likes right sums."""
    content = body["messages"][-1]["content"]
    parts = re.split(r"^<[0-9a-f]{12}> (.+)$", content, flags=re.MULTILINE)[1:]
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    question = re.search(r"(\d+) \+ 3", texts.get("User", ""))
    answers = [text for title, text in texts.items() if title.startswith("Assistant, the answer")]
    numbers = re.findall(r"\d+", "".join(answers))
    is_right = bool(question and numbers) and int(numbers[-1]) == int(question.group(1)) + 3
    if "response_format" in body:
        names = list(body["response_format"]["json_schema"]["schema"]["properties"])
        yes = names[:2] if is_right else []
        decisions = {name: {"reason": "I see.", "satisfied": "yes" if name in yes else "no"} for name in names}
        return completion(json.dumps(decisions))
    return completion(f"[[{9 if is_right else 1}]]" if texts else f"It is {4 + body.get('seed', 0) % 2}.")


class Reader:
    """A person who tries each block of a document in a folder with their data in place."""

    def __init__(self, folder: Path, host: Mapping[str, Values]) -> None:
        self.folder, self.host = folder, host
        self.names: Values = {"__name__": "document"}

    def try_block(self, block: Block) -> None:
        """Run a block: a file by its kind, commands one after another, Python in the page's session."""
        if block.file:
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        if block.language == "bash":
            for line in block.text.splitlines():
                self.run_command(shlex.split(line, comments=True))
        elif block.language == "python":
            self.names["__name__"] = Path(block.file or "document").stem
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), self.names)
            if block.file:
                self._use_definitions(block)
        else:
            self._run_yaml(block)

    def run_command(self, words: list[str]) -> None:
        """Run a line of a shell in this process."""
        program, *arguments = [MODELS.get(word, word) for word in words]
        if program == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", arguments)
                try:
                    runpy.run_path(arguments[0], run_name="__main__")
                except SystemExit as end:
                    assert not end.code, words
            return
        assert program == "align", f"not run: {words}"
        if any(word.startswith("pipeline.yaml") for word in arguments):  # the reader's own, which has run
            self.run_pipeline({"sample": self.host["sample"]})
        assert main([*arguments, *WORDS.get(arguments[0], [])]) == 0, words

    def _run_yaml(self, block: Block) -> None:
        shown = yaml.safe_load(block.text)
        if "sources" in shown:
            self.run_pipeline({"data": {"recipe": block.file}})
        elif "stages" in shown:
            self.run_command(["align", "run", block.file or ""])
        elif "space" in shown:
            self.run_command(["align", "sweep", block.file or "", "--dry-run"])
        elif "stages" not in shown and block.file:
            self.run_command(["align", "eval", "tiny", "--suite", block.file])
        else:
            assert not block.file
            self.run_pipeline({name: self._complete(name, fields) for name, fields in shown.items()})

    def _complete(self, name: str, fields: Values) -> Values:
        """Return the fields of a stage of the host, with those of a fragment in their place."""
        if "stage" in fields:
            return fields
        complete = {**self.host.get(name, {}), **fields}
        if "environment" in fields and "score" not in fields:
            complete.pop("score", None)  # only the environment's score counts
        return complete

    def run_pipeline(self, stages: Values) -> None:
        """Run stages together with those of the host that they name."""
        needed, waiting = set(stages), list(stages.values())
        while waiting:
            more = (named_stages(waiting.pop()) & self.host.keys()) - needed
            needed |= more
            waiting += [self.host[name] for name in more]
        complete = {name: stages.get(name, block) for name, block in self.host.items() if name in needed}
        Pipeline.from_dict({"name": "fragment", "stages": complete | stages}).run()

    def _use_definitions(self, block: Block) -> None:
        """Use each function as a score and each class as an environment; others are called by the page's commands."""
        module = Path(block.file or "").stem
        for name, value in list(self.names.items()):
            if getattr(value, "__module__", None) != module:
                continue
            if isinstance(value, type):
                environment = {"class": f"{module}:{name}", "max_turns": 2, "max_tokens": 64, "turn_max_tokens": 8}
                self.run_pipeline({"ppo": self._complete("ppo", {"environment": environment})})
            elif value.__code__.co_varnames[0] in ("row", "rows"):
                data = "talks" if name in STYLES else "data"
                self.run_pipeline({"grpo": {**self.host["grpo"], "prompts": data, "score": f"{module}:{name}"}})


def named_stages(value: object) -> set[str]:
    """Return all texts in a stage's block, the names of its inputs among them."""
    if isinstance(value, Mapping):
        return {name for item in value.values() for name in named_stages(item)}
    if isinstance(value, list):
        return {name for item in value for name in named_stages(item)}
    return {value} if isinstance(value, str) else set()


@contextlib.contextmanager
def small_pipelines(url: str, models: Path) -> Iterator[None]:
    """Load every pipeline at a size for tests, with ``url`` as its servers."""
    load = AnyPipeline.__init__

    def load_small(pipeline: AnyPipeline, raw: Values, *arguments: Any, **options: Any) -> None:
        load(pipeline, raw, *arguments, **options)  # as it stands
        load(pipeline, shrink(raw, url, models), *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnyPipeline, "__init__", load_small)
        yield


def shrink(raw: Values, url: str, models: Path) -> Values:
    """Return a pipeline's values at a size for tests."""
    small = copy.deepcopy(dict(raw))
    small["runtime"] = {**small.get("runtime", {}), "engine": {"name": "transformers"}, "device": "cpu"}
    for name, block in small["stages"].items():
        kind = kind_of(name, small["stages"])
        for field in DROPPED & block.keys():
            del block[field]
        fields = STAGES[kind].config_class().model_fields
        sizes = {field: size for field, size in KINDS.get(kind, {}).items() if field in fields}
        if "environment" in block:  # an episode has the limit of its environment
            sizes.pop("max_tokens", None)
        if "continue_from" in block:
            sizes["updates"] = 2
        block.update(sizes)
        if kind == "sample" and block.get("score") in SCORES:
            block["score"] = SCORES[block["score"]]
        if kind == "model" and block["source"] in MODELS:
            block["source"] = str(models / MODELS[block["source"]])
        shrink_inside(block, url)
    return small


def kind_of(name: str, stages: Mapping[str, Values]) -> str:
    """Return the kind of a stage: as it says, by its name, or of the stage that it continues."""
    block = stages[name]
    if "stage" in block:
        return str(block["stage"])
    return name if name in STAGES else kind_of(block["continue_from"], stages)


def shrink_inside(value: object, url: str) -> None:
    """Replace servers and lengths inside a stage's block."""
    if isinstance(value, list):
        for item in value:
            shrink_inside(item, url)
    elif isinstance(value, dict):
        if "url" in value:
            value["url"] = url
        if "model" in value.get("judge", {}):
            value["judge"] |= {"max_tokens": 8, "max_unreadable": 0.99}  # a tiny model writes few grades
            if "criteria" in value:
                value["on_error"] = 0.0  # and no JSON
        if "turn_max_tokens" in value or "max_turns" in value:
            value["turn_max_tokens"] = 8
        for item in value.values():
            shrink_inside(item, url)
