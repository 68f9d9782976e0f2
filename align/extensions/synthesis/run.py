"""The work of the ``synthesize`` stage: requests to the model and the judge, and the files of the artifact."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.config.endpoint import EndpointConfig
from align.data.rows import Message, Row, read_rows, user
from align.environments.episode import Episode, sampled_tokens
from align.environments.player import play_in_parts
from align.environments.user_models import check_user_rows
from align.errors import UserError
from align.extensions.synthesis import instructions, pairing, selection
from align.extensions.synthesis.config import BestOfTask, InstructionsTask, PairsTask, ResponsesTask
from align.extensions.synthesis.selection import Ledger, split_by_prompt
from align.inference.cached_client import Backend, CachedClient, Prices
from align.inference.endpoint_client import Endpoint
from align.inference.requests import Answer, Request, RequestCache
from align.inference.thoughts import check_stage_room
from align.models.chat.template_settings import TemplateSettings
from align.pipeline.context import StageContext
from align.scoring.score import open_score
from align.stages.prompt_episodes import EndpointEpisodes, EpisodeParts, Policy, episode_rates, report_failures
from align.stages.prompt_responses import PromptResponses, score_all, write_lines, write_table
from align.store.fingerprint import canonical
from align.store.json_files import write_text_atomically

SPLITS = ("train", "test")
COLUMNS = {"instructions": (), "pairs": ("chosen", "rejected")}
SHARED = "requests"
"""Folder of the store's cache with all requests and their answers."""
READY = [user("Reply with the one word: ready")]
"""A test request to the judge, sent before anything expensive starts."""


def synthesize(context: StageContext) -> dict[str, Any]:
    """Synthesize the rows, write them and the ledger, and return counts, tokens and cost.

    Raises ``UserError`` for wrong settings, an endpoint that cannot be used, a spent budget, and when there is no
    training row.
    """
    return _Synthesis(context).run()


@dataclass
class _Output:
    """Rows of each split, samples and ties to write."""

    rows: dict[str, list[Row]]
    samples: list[dict[str, Any]]
    ties: list[Row] | None = None


class _Synthesis:
    """A run of the stage."""

    def __init__(self, context: StageContext) -> None:
        config = context.config
        self.context = context
        self.config = config
        self.ledger = Ledger()
        if config.environment is not None:
            for split in SPLITS:
                check_user_rows(config.environment, self._prompts(split), context.name)
        # The scorer is loaded first, so a misspelled name ends the stage at once.
        self.scorer = open_score(context)
        self.engines: Any = None
        self.played: list[Episode] = []
        """Episodes of both splits, if an environment plays them."""
        self.user_usage: dict[str, Any] = {}
        """Requests, tokens and cost of a server that plays the user of episodes."""
        self.model = self._backend("model", config.endpoint, "endpoint")
        self.judge = None
        if config.judge is not None:
            self.judge = self._backend("judge_model", config.judge.endpoint, "judge.endpoint")
        # The stage's own cache survives a kill; the store's spares other runs the same requests.
        stage_cache = RequestCache(context.checkpoints)
        folder = context.shared_answers(SHARED)
        shared_cache = None if folder is None else RequestCache(folder)
        for cache in (stage_cache, shared_cache):
            if cache is not None and cache.unreadable:
                context.warn(f"{cache.unreadable} lines in {cache.folder} are damaged; these requests are sent again")
        prices: dict[str, Prices] = {}
        for name, endpoint in (("model", config.endpoint), ("judge", config.judge and config.judge.endpoint)):
            if endpoint is not None and endpoint.price_input is not None:
                prices[name] = Prices(endpoint.price_input, endpoint.price_output)
        self.client = CachedClient(stage_cache, shared_cache, config.max_cost, prices, self._progress)

    def _backend(self, field: str, endpoint: EndpointConfig | None, place: str) -> Backend:
        if endpoint is not None:
            return Endpoint(endpoint, drop=self.config.on_error == "drop", place=place)
        # Imported late, since they import torch.
        from align.extensions.synthesis.local_model import Engines, LocalModel
        from align.models.compute.processes import use_threads

        use_threads(self.context.runtime)
        config = self.config
        if self.engines is None:
            answers = max(config.max_tokens, 0 if config.judge is None else config.judge.max_tokens)
            self.engines = Engines(self.context, config.max_prompt_tokens + answers)
        model = LocalModel(self.engines, self.context.artifact(field), config.max_prompt_tokens, self.context.precision)
        is_judge = field == "judge_model"
        if not is_judge:
            check_stage_room(self.context, model.tokenizer)
            model.set_thinking_budget(config.thinking_budget)
        prefix = f"stages.{self.context.name}.{'judge.' if is_judge else ''}"
        model.set_template(TemplateSettings.of(config.judge if is_judge else config), prefix)
        return model

    def _progress(self, completed: int, total: int, tokens: int) -> None:
        # Cost is only known for endpoints with prices.
        spent = {"cost": round(self.client.budget.spent, 4)} if self.client.prices else {}
        self.context.progress(completed, total, "requests", tokens, **spent)

    def run(self) -> dict[str, Any]:
        """Do the stage and return its metrics."""
        try:
            # A wrong address or key of the judge should not surface after hours of sampling.
            if isinstance(self.judge, Endpoint):
                self._ask_judge([READY], fresh=True)
            output = self._instructions() if isinstance(self.config.task, InstructionsTask) else self._responses()
        finally:
            if self.engines is not None:
                self.engines.close()
        return self._write(output)

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

    def _instructions(self) -> _Output:
        """Write new instructions from seeds, and split them by prompt."""
        task = self.config.task
        if self.config.seeds is not None:
            seeds = instructions.read_seeds(Path.cwd() / self.config.seeds)
        else:
            seeds = instructions.seeds_from_prompts(self._prompts("train"))

        def ask(conversations: list[list[Message]], first: int) -> list[Answer]:
            requests = [self._request(messages, number) for number, messages in enumerate(conversations, start=first)]
            return self.client.ask(self.model, requests)

        rows, records = instructions.make_instructions(task, seeds, ask, self.context.seed, self.ledger)
        if len(rows) < task.count:
            self.context.warn(
                f"{len(rows)} of {task.count} instructions came out of {len(records)} requests "
                f"({self.ledger.counts(instructions.LEVEL)}); raise task.max_requests for more"
            )
        return _Output(split_by_prompt(rows, task.test_size, self.context.seed), records)

    # ---- responses to prompts ---------------------------------------------------------------------------------------

    def _prompts(self, split: str) -> list[Row]:
        rows = read_rows(self.context.artifact("prompts").split(split))
        return rows[: getattr(self.config.max_prompts, split)]

    def _responses(self) -> _Output:
        """Sample responses to the prompts of both splits, or play episodes; score them, and select rows."""
        prompts = {split: self._prompts(split) for split in SPLITS}
        # 1. Responses or episodes for both splits.
        responses = self._answer(prompts) if self.config.environment is None else self._play(prompts)
        if self.engines is not None and self.judge is None:
            self.engines.close()  # frees memory for the reward model
        # 2. Scores of both splits in one call, so a reward model fills its batches.
        if self.scorer is not None or self.config.environment is not None:
            score_all([*responses["train"], *responses["test"]], self.scorer)
        # 3. Rows, split by split.
        output = _Output({}, [], [] if isinstance(self.config.task, PairsTask) else None)
        for split in SPLITS:
            output.rows[split] = self._select(responses[split], split, output)
            output.samples += [prompt_responses.to_json(split) for prompt_responses in responses[split]]
        return output

    def _answer(self, prompts: dict[str, list[Row]]) -> dict[str, list[PromptResponses]]:
        """Return ``n`` responses to every prompt."""
        requests = self._requests([row["prompt"] for split in SPLITS for row in prompts[split]])
        answers = iter(self.client.ask(self.model, requests))
        responses: dict[str, list[PromptResponses]] = {}
        for split in SPLITS:
            responses[split] = [
                PromptResponses(row, [next(answers) for _ in range(self.config.task.n)]) for row in prompts[split]
            ]
        return responses

    def _play(self, prompts: dict[str, list[Row]]) -> dict[str, list[PromptResponses]]:
        """Return ``n`` episodes of every prompt, by the checkpoint or the endpoint."""
        samples = self.config.task.n
        parts = self._open_episodes(samples * sum(map(len, prompts.values())))
        responses: dict[str, list[PromptResponses]] = {}
        try:
            for split, rows in prompts.items():
                episodes = play_in_parts(parts.play_part, split, rows, samples, self.context.seed)
                responses[split] = [
                    PromptResponses.of_episodes(row, row_episodes, parts.tools)
                    for row, row_episodes in zip(rows, episodes, strict=True)
                ]
                self.played += [episode for row_episodes in episodes for episode in row_episodes]
            self.user_usage = parts.user_usage()
        finally:
            parts.close()
        report_failures(self.context, self.played)
        return responses

    def _open_episodes(self, total: int) -> EpisodeParts | EndpointEpisodes:
        """Open the environment, for ``total`` episodes of the checkpoint or the endpoint.

        Raises ``UserError`` for an episode that leaves no room for its prompt.
        """
        config = self.config
        model = self.model
        engines = self.engines
        if isinstance(model, Endpoint):
            speaker = config.environment.user
            if speaker is not None and speaker.model is not None:
                # Imported late, since it imports torch, which only the user's checkpoint needs.
                from align.models.compute.processes import use_threads

                use_threads(self.context.runtime)
            return EndpointEpisodes(self.context, model.identity, lambda requests: self.client.ask(model, requests))
        # Imported late, since it imports torch.
        from align.extensions.synthesis.local_model import LocalModel

        assert isinstance(model, LocalModel)
        limit = config.max_prompt_tokens
        tokens = config.environment.max_tokens
        if model.max_positions is not None:
            limit = min(limit, model.max_positions - tokens)
        if limit < 1:
            raise UserError(
                f"environment.max_tokens is {tokens}, and the model has {model.max_positions} positions, which the "
                "prompt needs too; lower it."
            )
        weights = model.identity["checkpoint"]
        model_dir = model.model_dir
        policy = Policy(model.tokenizer, weights, lambda: engines.with_weights(model_dir), limit, config.system)
        return EpisodeParts(self.context, policy, total)

    def _requests(self, prompts: list[list[Message]]) -> list[Request]:
        """Return ``n`` requests per prompt; a repeated prompt gets further sample numbers, and so other answers."""
        times: Counter[str] = Counter()
        requests = []
        for prompt in prompts:
            # Requests are cached by content and sample number.
            name = canonical(prompt)
            first = times[name]
            times[name] += self.config.task.n
            requests += [self._request(prompt, sample) for sample in range(first, times[name])]
        return requests

    def _select(self, prompts: list[PromptResponses], split: str, output: _Output) -> list[Row]:
        """Return the rows that the task makes of a split's responses; ties go to ``output``."""
        task = self.config.task
        seed = self.context.seed
        ledger = self.ledger
        if isinstance(task, ResponsesTask):
            return selection.select_all(task, prompts, ledger)
        if isinstance(task, BestOfTask):
            return selection.select_best(task, prompts, ledger)
        if self.config.judge is None:
            result = pairing.pair_by_score(task, prompts, seed, ledger)
        else:
            judge = pairing.Judge(self.config.judge.rubric, self._ask_judge)
            result = pairing.pair_by_judge(task, prompts, judge, seed, ledger)
        assert output.ties is not None
        output.ties += [{**row, "split": split} for row in result.ties]
        return result.pairs

    def _ask_judge(self, questions: list[list[Message]], fresh: bool = False) -> list[Answer]:
        judge = self.config.judge
        assert self.judge is not None and judge is not None
        request = Request(self.judge.identity, [], judge.max_tokens, judge.temperature, 1.0, self.context.seed)
        requests = [replace(request, messages=messages) for messages in questions]
        return self.client.ask(self.judge, requests, "judge", fresh=fresh)

    # ---- files ------------------------------------------------------------------------------------------------------

    def _write(self, output: _Output) -> dict[str, Any]:
        config = self.config
        folder = self.context.output
        columns = COLUMNS.get(config.task.type, ("completion",))
        for split in SPLITS:
            write_table(folder / f"{split}.parquet", output.rows[split], columns)
        if output.ties is not None:
            write_table(folder / "ties.parquet", output.ties, ("responses",))
        write_lines(folder / "samples.jsonl", output.samples)
        write_lines(folder / "dropped.jsonl", self.ledger.dropped)
        splits = {split: len(output.rows[split]) for split in SPLITS}
        ledger = {
            "task": config.task.type,
            "models": {"model": self.model.identity, **({"judge": self.judge.identity} if self.judge else {})},
            **self.ledger.to_json(),
            "rows": splits,
            **({} if output.ties is None else {"ties": len(output.ties)}),
            "notes": dict(sorted(self.ledger.notes.items())),
            "usage": self.client.usage_json(),
        }
        write_text_atomically(folder / "ledger.json", json.dumps(ledger, indent=2) + "\n")
        # After the files are written, so a stage without rows leaves its reasons to be read.
        self._check_splits(splits, output)
        return self._metrics(ledger)

    def _check_splits(self, splits: dict[str, int], output: _Output) -> None:
        """Raise ``UserError`` if there is no training row, and warn if there is no test row."""
        levels = ", ".join(self.ledger.counts(level) for level in self.ledger.tallies)
        if splits["train"] == 0:
            ties = "" if output.ties is None else f", {len(output.ties)} ties"
            raise UserError(
                f"no train row came out ({levels}{ties}). See dropped.jsonl for why, and samples.jsonl, in "
                f"{self.context.output}."
            )
        if splits["test"] == 0:
            self.context.warn("no test row came out; give the prompts' stage a test split, or raise max_prompts.test")

    def _metrics(self, ledger: dict[str, Any]) -> dict[str, Any]:
        usage = ledger["usage"]
        tokens = sum(model["completion_tokens"] + model["copied_completion_tokens"] for model in usage.values())
        metrics = {f"{split}_rows": ledger["rows"][split] for split in SPLITS}
        for level in self.ledger.tallies:
            metrics |= {f"{level}_in": ledger[level]["in"], f"{level}_out": ledger[level]["out"]}
        costs = [model["cost"] for model in usage.values() if "cost" in model]
        endpoints = [backend for backend in (self.model, self.judge) if isinstance(backend, Endpoint)]
        return {
            **metrics,
            "dropped": {level: ledger[level]["dropped"] for level in self.ledger.tallies},
            **({"ties": ledger["ties"]} if "ties" in ledger else {}),
            "tokens": tokens + sum(map(sampled_tokens, self.played if self.engines is not None else [])),
            "prompt_tokens": sum(model["prompt_tokens"] + model["copied_prompt_tokens"] for model in usage.values()),
            "usage": usage,
            "asked_in_this_attempt": self.client.new,
            "retries_in_this_attempt": sum(endpoint.retried for endpoint in endpoints),
            **({"cost": round(sum(costs), 6), "spent": round(self.client.budget.spent, 6)} if costs else {}),
            **({} if self.scorer is None else self.scorer.facts()),
            "engines": [] if self.engines is None else self.engines.names,
            **episode_rates(self.played),
            **self.user_usage,
        }
