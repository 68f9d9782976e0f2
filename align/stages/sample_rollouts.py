"""The rollouts that ``sample`` stores: a file for each chunk of prompts, with the scores once all are sampled."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from align.config.runtime.rollouts import SAMPLE_CHUNK
from align.data.rows import Row
from align.evaluation.score_validation.references import reference_of
from align.inference.protocol import Response
from align.models.chat.token_texts import TokenTexts
from align.pipeline.context import StageContext
from align.rl.rollout_tables import episode_columns
from align.stages.prompt_responses import PromptResponses
from align.store.rollout_writer import intact_files, read_tables, resume_manifest, write_file, write_manifest
from align.store.rollouts import ROLLOUTS, SCHEMA, RolloutFile, encode_value, identify_prompt, is_kept, make_table
from align.training.sampled_answers import response_columns
from align.verifiers.verdict import reasons_in


class SampledRollouts:
    """Writes the responses of a stage ``sample``, up to ``rollouts.max_gb``; further files have no rows."""

    def __init__(self, context: StageContext, tokenizer: Any) -> None:
        self.context = context
        self.config = context.config.rollouts
        self.folder = context.checkpoints / ROLLOUTS
        self.output = context.output / ROLLOUTS
        self.settings = {"stage": "sample", "keep": self.config.keep, "temperature": context.config.temperature}
        self.token_texts = TokenTexts(tokenizer)
        self.files = resume_manifest(self.folder, context.warn)
        """Files of an earlier attempt, and files that were written."""
        # A killed stage may have begun to write its output.
        shutil.rmtree(self.output, ignore_errors=True)
        self._has_warned = False

    def has_chunk(self, split: str, start: int) -> bool:
        """Return True if the responses of a chunk need not be sampled again to store them."""
        return not self.config.keep or any(_is_chunk(file, split, start) for file in self.files)

    def write_chunk(self, split: str, start: int, chunk: Iterable[tuple[Row, list[int], list[Response]]]) -> None:
        """Write the responses to the prompts from number ``start`` on, which have no scores yet.

        ``chunk`` has the row, the token ids and the responses of each prompt.
        """
        lines: list[dict[str, Any]] = []
        for number, (row, prompt_ids, responses) in enumerate(chunk, start):
            columns = self._prompt_columns(row, split, number)
            if columns is not None:
                columns["prompt_ids"] = prompt_ids
                lines += [
                    columns | {"index": i} | response_columns(r, self.token_texts) for i, r in enumerate(responses)
                ]
        self._write(make_table(lines), self.folder, split, start)
        if self.config.keep:
            write_manifest(self.folder, self.files)

    def finish(self, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Write the chunks with their scores into the stage's output; ``samples`` has the samples of each split."""
        for file in intact_files(self.folder, self.files, self.context.warn):
            split, start, _ = file.name.split("-")
            if int(start) < len(samples.get(split, ())):
                scored = [_with_scores(table, samples[split]) for table in read_tables(self.folder, [file])]
                write_file(self.output, scored, self.settings, prefix=f"{split}-{start}")

    def write_episodes(self, split: str, prompts: Sequence[PromptResponses]) -> None:
        """Write the scored episodes of a split into the stage's output."""
        for start in range(0, len(prompts), SAMPLE_CHUNK):
            lines: list[dict[str, Any]] = []
            for number, prompt in enumerate(prompts[start : start + SAMPLE_CHUNK], start):
                columns = self._prompt_columns(prompt.row, split, number)
                if columns is not None:
                    lines += [columns | line for line in self._episode_lines(prompt)]
            self._write(make_table(lines), self.output, split, start)

    def _write(self, table: pa.Table, folder: Path, split: str, start: int) -> None:
        if not self.config.keep:
            return
        prefix = f"{split}-{start:07d}"
        others = [file for file in self.files if not _is_chunk(file, split, start)]
        file = write_file(folder, [table], self.settings, prefix=prefix)
        if sum(other.bytes for other in others) + file.bytes > self.config.max_bytes:
            (folder / file.name).unlink()
            # An empty file shows a resumed stage that the chunk was sampled.
            file = write_file(folder, [SCHEMA.empty_table()], self.settings, prefix=prefix)
            if not self._has_warned:
                self._has_warned = True
                self.context.warn(f"the rollouts reached rollouts.max_gb {self.config.max_gb:g}; no more are stored")
        self.files = sorted([*others, file], key=lambda file: file.name)

    def _prompt_columns(self, row: Row, split: str, number: int) -> dict[str, Any] | None:
        """Return the columns of a prompt; None if its responses are not stored."""
        identity = identify_prompt(row)
        if not is_kept(identity, self.config.keep):
            return None
        return {
            "split": split,
            "group": number,
            "prompt_id": identity,
            "prompt": row["prompt"],
            "reference": reference_of(row),
            "learned": False,
        }

    def _episode_lines(self, prompt: PromptResponses) -> Iterable[dict[str, Any]]:
        for index, episode in enumerate(prompt.episodes):
            parts = {name: values[index] for name, values in prompt.parts.items()}
            yield {
                "index": index,
                **_score_columns(prompt.scores[index], parts),
                "response": episode.text,
                "finished": episode.finished,
                "tokens": episode.length,
                "prompt_ids": episode.prompt_ids,
                "token_ids": episode.token_ids,
                "token_texts": self.token_texts(episode.token_ids),
                "response_mask": episode.mask,
                "sampler_logprobs": episode.logprobs,
                **episode_columns(episode),
            }


def _is_chunk(file: RolloutFile, split: str, start: int) -> bool:
    return file.name.startswith(f"{split}-{start:07d}-")


def _with_scores(table: pa.Table, samples: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the rows of a chunk with the scores of the split's samples."""
    columns: dict[str, list[Any]] = {"score": [], "scores": [], "reasons": [], "explanation": []}
    for group, index in zip(table["group"].to_pylist(), table["index"].to_pylist(), strict=True):
        sample = samples[group]
        parts = {name: values[index] for name, values in (sample.get("parts") or {}).items()}
        explanations = sample.get("explanations")
        scored = _score_columns(sample["scores"][index], parts)
        scored["explanation"] = (explanations[index] if explanations else None) or None
        for name, value in scored.items():
            columns[name].append(encode_value(name, value))
    for name, values in columns.items():
        field = SCHEMA.field(name)
        table = table.set_column(SCHEMA.get_field_index(name), field, pa.array(values, field.type))
    return table


def _score_columns(score: float | None, parts: Mapping[str, float | None]) -> dict[str, Any]:
    scores = {name: value for name, value in parts.items() if value is not None and math.isfinite(value)}
    return {"score": score, "scores": scores, "reasons": reasons_in(scores)}
