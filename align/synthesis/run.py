"""The work of the ``synthesize`` stage: who is asked, in which order, and what is written."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.config.stages.synthesis_tasks import BestOfTask, InstructionsTask, PairsTask, ResponsesTask
from align.config.user_paths import user_path
from align.data.rows import Message, Row, read_rows, user
from align.errors import UserError
from align.inference.cached_client import Asker, Backend, Prices
from align.inference.endpoint import EndpointConfig
from align.inference.endpoint_client import Endpoint
from align.inference.requests import Answer, Request, RequestCache
from align.pipeline.context import StageContext
from align.store.fingerprint import canonical
from align.synthesis import choosing, instructions, pairing
from align.synthesis.choosing import Answered
from align.synthesis.counts import Book, split_by_prompt, write_lines, write_table

SPLITS = ("train", "test")
COLUMNS = {"instructions": (), "pairs": ("chosen", "rejected")}
SHARED = "requests"
"""Folder of the store's cache that has everything that was asked and answered."""
PROGRESS_SECONDS = 0.2
READY = [user("Reply with the one word: ready")]
"""What a judge is asked before anything expensive starts."""


def synthesize(context: StageContext) -> dict[str, Any]:
    """Make the rows, write them and the ledger; returns counts, tokens and cost.

    Raises ``UserError`` for wrong settings, an endpoint that cannot be used, a budget that is spent, and when no
    training row comes out.
    """
    return _Synthesis(context).run()


@dataclass
class _Made:
    """What is written."""

    rows: dict[str, list[Row]]
    samples: list[dict[str, Any]]
    ties: list[Row] | None = None


class _Synthesis:
    def __init__(self, context: StageContext) -> None:
        config = context.config
        self.context, self.config, self.book = context, config, Book()
        self.score = None if config.score is None else _function(config.score)  # a misspelled name ends it here
        self.engines: Any = None
        self._told = 0.0
        self.model = self._backend("model", config.endpoint, "endpoint")
        self.judge = None
        if config.judge is not None:
            self.judge = self._backend("judge_model", config.judge.endpoint, "judge.endpoint")
        cache = RequestCache(context.checkpoints)
        folder = _shared_folder(context)
        shared = None if folder is None else RequestCache(folder)
        for one in (cache, shared):
            if one is not None and one.unreadable:
                context.warn(
                    f"{one.unreadable} lines in {one.folder} are not what was written there; they are asked again"
                )
        prices = {
            name: Prices(endpoint.price_input, endpoint.price_output)
            for name, endpoint in (("model", config.endpoint), ("judge", config.judge and config.judge.endpoint))
            if endpoint is not None and endpoint.price_input is not None
        }
        self.asker = Asker(cache, shared, config.max_cost, prices, self._progress)

    def _backend(self, field: str, endpoint: EndpointConfig | None, place: str) -> Backend:
        if endpoint is not None:
            return Endpoint(endpoint, drop=self.config.on_error == "drop", place=place)
        from align.models.threads import use_threads
        from align.synthesis.local_model import Engines, LocalModel

        use_threads(self.context.runtime)
        config = self.config
        if self.engines is None:
            answers = max(config.max_tokens, 0 if config.judge is None else config.judge.max_tokens)
            self.engines = Engines(self.context, config.max_prompt_tokens + answers)
        return LocalModel(self.engines, self.context.artifact(field), config.max_prompt_tokens, config.precision)

    def _progress(self, done: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        if done < total and now - self._told < PROGRESS_SECONDS:
            return  # an endpoint may answer hundreds of times a second, and each report is a line in a file
        self._told = now
        spent = {"cost": round(self.asker.budget.spent, 4)} if self.asker.prices else {}
        self.context.progress(done, total, "requests", tokens, **spent)

    def run(self) -> dict[str, Any]:
        try:
            if isinstance(self.judge, Endpoint):
                self._ask_judge([READY], fresh=True)
            made = self._instructions() if isinstance(self.config.task, InstructionsTask) else self._answers()
        finally:
            if self.engines is not None:
                self.engines.close()
        return self._write(made)

    def _request(self, messages: list[Message], sample: int) -> Request:
        config = self.config
        if config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system}, *messages]
        return Request(
            model=self.model.identity,
            messages=messages,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=self.context.seed,
            sample=sample,
        )

    # ---- instructions -----------------------------------------------------------------------------------------------

    def _instructions(self) -> _Made:
        task = self.config.task
        if self.config.seeds is not None:
            seeds = instructions.read_seeds(Path.cwd() / self.config.seeds)
        else:
            seeds = instructions.seeds_of(self._prompts("train"))

        def ask(conversations: list[list[Message]], first: int) -> list[Answer]:
            requests = [self._request(one, first + place) for place, one in enumerate(conversations)]
            return self.asker.ask(self.model, requests)

        rows, records = instructions.make_instructions(task, seeds, ask, self.context.seed, self.book)
        if len(rows) < task.count:
            self.context.warn(
                f"{len(rows)} of {task.count} instructions came out of {len(records)} requests "
                f"({self.book.counts(instructions.LEVEL)}); raise task.max_requests for more"
            )
        return _Made(split_by_prompt(rows, task.test_size, self.context.seed), records)

    # ---- answers to prompts -----------------------------------------------------------------------------------------

    def _prompts(self, split: str) -> list[Row]:
        rows = read_rows(self.context.artifact("prompts").split(split))
        return rows[: getattr(self.config.max_prompts, split)]

    def _answers(self) -> _Made:
        prompts = {split: self._prompts(split) for split in SPLITS}
        wanted = self._wanted([row["prompt"] for split in SPLITS for row in prompts[split]])
        given = iter(self.asker.ask(self.model, wanted))
        answered = {
            split: [Answered(row, [next(given) for _ in range(self.config.task.n)]) for row in prompts[split]]
            for split in SPLITS
        }
        if self.engines is not None and self.judge is None:
            self.engines.close()  # before a reward model is loaded
        self._label([one for split in SPLITS for one in answered[split]])
        made = _Made({}, [], [] if isinstance(self.config.task, PairsTask) else None)
        for split in SPLITS:
            made.rows[split] = self._choose(answered[split], split, made)
            made.samples += [one.to_json(split) for one in answered[split]]
        return made

    def _wanted(self, prompts: list[list[Message]]) -> list[Request]:
        """``n`` requests a prompt. A prompt that is there again goes on counting, so that its answers are its own."""
        times: Counter[str] = Counter()
        requests = []
        for prompt in prompts:
            name = canonical(prompt)
            first = times[name]
            times[name] += self.config.task.n
            requests += [self._request(prompt, sample) for sample in range(first, times[name])]
        return requests

    def _label(self, answered: list[Answered]) -> None:
        """Scores, for both splits at once."""
        if self.score is not None:
            choosing.score_all(answered, self.score)
        elif self.config.reward is not None:
            choosing.score_all(answered, self._reward())

    def _reward(self) -> choosing.Score:
        from align.models.reward import RewardModel
        from align.models.threads import device_of, use_threads

        use_threads(self.context.runtime)
        folder = self.context.artifact("reward").model
        model = RewardModel(folder, device_of(self.context.runtime), self.config.precision)
        return lambda rows, texts, cut: model.score([row["prompt"] for row in rows], texts, [not one for one in cut])

    def _choose(self, answered: list[Answered], split: str, made: _Made) -> list[Row]:
        task, seed, book = self.config.task, self.context.seed, self.book
        if isinstance(task, ResponsesTask):
            return choosing.responses(task, answered, book)
        if isinstance(task, BestOfTask):
            return choosing.best_of(task, answered, book)
        if self.config.judge is None:
            paired = pairing.pair_by_score(task, answered, seed, book)
        else:
            rubric = self.config.judge.rubric
            paired = pairing.pair_by_judge(task, answered, rubric, self._ask_judge, seed, book)
        assert made.ties is not None
        made.ties += [{**row, "split": split} for row in paired.ties]
        return paired.pairs

    def _ask_judge(self, questions: list[list[Message]], fresh: bool = False) -> list[Answer]:
        judge = self.config.judge
        assert self.judge is not None and judge is not None
        request = Request(self.judge.identity, [], judge.max_tokens, judge.temperature, 1.0, self.context.seed)
        return self.asker.ask(self.judge, [replace(request, messages=one) for one in questions], "judge", fresh=fresh)

    # ---- what is written --------------------------------------------------------------------------------------------

    def _write(self, made: _Made) -> dict[str, Any]:
        config, output = self.config, self.context.output
        columns = COLUMNS.get(config.task.type, ("completion",))
        for split in SPLITS:
            write_table(output / f"{split}.parquet", made.rows[split], columns)
        if made.ties is not None:
            write_table(output / "ties.parquet", made.ties, ("responses",))
        write_lines(output / "samples.jsonl", made.samples)
        write_lines(output / "dropped.jsonl", self.book.dropped)
        splits = {split: len(made.rows[split]) for split in SPLITS}
        ledger = {
            "task": config.task.type,
            "models": {"model": self.model.identity, **({"judge": self.judge.identity} if self.judge else {})},
            **self.book.to_json(),
            "rows": splits,
            **({} if made.ties is None else {"ties": len(made.ties)}),
            "notes": dict(sorted(self.book.notes.items())),
            "usage": self.asker.usage_json(),
        }
        (output / "ledger.json").write_text(json.dumps(ledger, indent=2) + "\n", encoding="utf-8")
        self._refuse_nothing(splits, made)
        return self._metrics(ledger)

    def _refuse_nothing(self, splits: dict[str, int], made: _Made) -> None:
        levels = ", ".join(self.book.counts(level) for level in self.book.tallies)
        if splits["train"] == 0:
            ties = "" if made.ties is None else f", {len(made.ties)} ties"
            raise UserError(
                f"no train row came out ({levels}{ties}). See dropped.jsonl for why, and samples.jsonl, in "
                f"{self.context.output}."
            )
        if splits["test"] == 0:
            self.context.warn("no test row came out; give the prompts' stage a test split, or raise max_prompts.test")

    def _metrics(self, ledger: dict[str, Any]) -> dict[str, Any]:
        usage = ledger["usage"]
        metrics = {f"{split}_rows": ledger["rows"][split] for split in SPLITS}
        for level in self.book.tallies:
            metrics |= {f"{level}_in": ledger[level]["in"], f"{level}_out": ledger[level]["out"]}
        costs = [one["cost"] for one in usage.values() if "cost" in one]
        asked = [one for one in (self.model, self.judge) if isinstance(one, Endpoint)]
        return {
            **metrics,
            "dropped": {level: ledger[level]["dropped"] for level in self.book.tallies},
            **({"ties": ledger["ties"]} if "ties" in ledger else {}),
            "tokens": sum(one["completion_tokens"] + one["copied_completion_tokens"] for one in usage.values()),
            "prompt_tokens": sum(one["prompt_tokens"] + one["copied_prompt_tokens"] for one in usage.values()),
            "usage": usage,
            "asked_in_this_attempt": self.asker.new,
            "retries_in_this_attempt": sum(one.retried for one in asked),
            **({"cost": round(sum(costs), 6), "spent": round(self.asker.budget.spent, 6)} if costs else {}),
            "engines": [] if self.engines is None else self.engines.names,
        }


def _shared_folder(context: StageContext) -> Path | None:
    """Where answers are shared; None for nowhere, also where a stage runs without a store."""
    place = context.config.cache
    if isinstance(place, str):
        return user_path(place, Path.cwd())
    return context.cache / SHARED if place and context.cache is not None else None


def _function(path: str) -> Callable[[list[Row], list[str], list[bool]], list[float]]:
    from align.data.scoring import function_scorer

    return function_scorer(path).score
