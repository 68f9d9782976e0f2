"""Linting trl's own trainers, as a script drives them: what they prepare, mask, cut and pack is what is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from align.data.rows import assistant
from align.lint.findings import Finding
from align.lint.trainer import lint_trainer
from align.models.loading import load_policy, load_tokenizer, new_reward
from tests.support.lint.harness import SPOILT, Row, alarms, instructions, pairs
from tests.support.refusals import Refused

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OUTSIDE = MARKED.replace(
    "+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}"
)


def messages(rows: list[Row]) -> Dataset:
    return Dataset.from_list([{"messages": [*row["prompt"], *row["completion"]]} for row in rows])


def sft(model: Path, out: Path, rows: list[Row], dataset: Dataset, template: str, **options: Any) -> dict[str, Finding]:
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template
    args = SFTConfig(str(out), use_cpu=True, bf16=False, report_to="none", **{"max_length": 512, **options})
    trainer = SFTTrainer(load_policy(model), args, train_dataset=dataset, processing_class=tokenizer)
    return {finding.name: finding for finding in lint_trainer(trainer, rows)}


def test_a_mask_of_the_assistants_turns(tiny_model: Path, tmp_path: Path) -> None:
    rows = instructions()
    options = {"assistant_only_loss": True}
    assert not sft(tiny_model, tmp_path, rows, messages(rows), MARKED, **options)
    findings = sft(tiny_model, tmp_path, rows, messages(rows), END_OUTSIDE, **options)
    assert findings["eos-masked"].count == len(rows)
    only_last = MARKED.replace("== 'assistant' %}{% gen", "== 'assistant' and loop.last %}{% gen")
    findings = sft(tiny_model, tmp_path, rows, messages(rows), only_last, **options)
    assert findings["middle-turns-unsupervised"].count == len(rows) // 2  # every second one has two answers


def test_trl_trains_on_every_token_of_messages_by_default(tiny_model: Path, tmp_path: Path) -> None:
    rows = instructions()
    assert sft(tiny_model, tmp_path, rows, messages(rows), MARKED)["labels-none-masked"].count == len(rows)


def test_prompt_and_completion(tiny_model: Path, tmp_path: Path) -> None:
    rows = instructions()
    dataset = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    # ChatML's line break behind the end of turn is supervised too: harmless, and no finding.
    assert not sft(tiny_model, tmp_path, rows, dataset, MARKED)
    rows[SPOILT]["completion"] = [assistant("word " * 200)]
    dataset = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    findings = sft(tiny_model, tmp_path, rows, dataset, MARKED, max_length=400)
    assert alarms(findings) == {"answer-truncated"}
    assert findings["answer-truncated"].examples[0].place.row == SPOILT + 1  # type: ignore[union-attr]


def test_a_prompt_rendered_otherwise_for_sampling(tiny_model: Path, tmp_path: Path) -> None:
    """trl only warns, and leaves the end of the prompt out of the training sequence."""
    rows = instructions()
    dataset = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    template = MARKED + "{% if add_generation_prompt %}{{ '<think></think>' }}{% endif %}"
    assert sft(tiny_model, tmp_path, rows, dataset, template)["generation-prompt-differs"].count == len(rows)


def test_packed_documents(tiny_model: Path, tmp_path: Path) -> None:
    rows = instructions()
    dataset = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    tokenizer = load_tokenizer(tiny_model)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", packing=True, max_length=1200)
    trainer = SFTTrainer(load_policy(tiny_model), args, train_dataset=dataset, processing_class=tokenizer)
    assert len(trainer.train_dataset) < len(rows)
    assert not lint_trainer(trainer, rows)
    packing = trainer.data_collator

    def positions_run_on(inputs: Any) -> Any:
        batch = packing(inputs)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    trainer.data_collator = positions_run_on
    actual = {finding.name: finding for finding in lint_trainer(trainer, rows)}
    assert actual["pack-leak"].count == len(trainer.train_dataset)


def test_pairs_of_dpo_and_reward(tiny_model: Path, tmp_path: Path) -> None:
    rows = pairs()
    tokenizer = load_tokenizer(tiny_model)
    dataset = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    common: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": 512}
    dpo = DPOTrainer(load_policy(tiny_model), None, DPOConfig(str(tmp_path), **common), train_dataset=dataset,
                     processing_class=tokenizer)  # fmt: skip
    assert not lint_trainer(dpo, rows)
    dpo.data_collator.max_length = 150  # cuts the answers of the longer conversations, as trl does by default at 1024
    assert "answer-truncated" in {finding.name for finding in lint_trainer(dpo, rows)}
    reward = RewardTrainer(new_reward(tiny_model), RewardConfig(str(tmp_path), **common), train_dataset=dataset,
                           processing_class=tokenizer)  # fmt: skip
    assert not lint_trainer(reward, rows)
    rows[SPOILT]["rejected"] = rows[SPOILT]["chosen"]
    dataset = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    reward = RewardTrainer(new_reward(tiny_model), RewardConfig(str(tmp_path), **common), train_dataset=dataset,
                           processing_class=tokenizer)  # fmt: skip
    assert {finding.name for finding in lint_trainer(reward, rows)} == {"chosen-equals-rejected"}


def test_rows_that_trl_has_dropped_are_missed(tiny_model: Path, tmp_path: Path) -> None:
    rows = pairs()
    dataset = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])

    def findings(max_length: int) -> dict[str, Finding]:
        args = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=max_length)
        trainer = RewardTrainer(
            new_reward(tiny_model), args, train_dataset=dataset, processing_class=load_tokenizer(tiny_model)
        )
        return {finding.name: finding for finding in lint_trainer(trainer, rows)}

    assert not findings(512)
    some = findings(150)["rows-dropped"]
    assert (some.severity, some.examples[0].excerpt) == ("warning", "4 of 8 rows are left")
    none = findings(10)["no-rows-left"]
    assert (none.severity, none.examples[0].excerpt) == ("error", "0 of 8 rows are left")


def test_another_kind_of_trainer_is_refused(refused: Refused) -> None:
    refused(lint_trainer, "trainer")
