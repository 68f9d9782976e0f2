"""A policy that was trained with thoughts is not sampled without them, nor the other way around."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from align.checks.facts import read_facts
from align.checks.stage import check_inputs, check_output
from align.config.base import Config
from align.config.stages.sample import SampleConfig
from align.models.chat.template_settings import TemplateSettings
from align.store.artifacts import Artifact, Kind
from tests.support.chat_templates import THINKING
from tests.support.checks.contexts import context
from tests.support.refusals import Refused


def trained(folder: Path, source: Path, inputs: dict[str, Any] | None = None, **metrics: Any) -> Artifact:
    shutil.copytree(source, folder / "model", ignore=shutil.ignore_patterns("align.json"))
    check_output(context(folder, inputs or {}), "sft", Kind.POLICY, metrics)
    return Artifact(folder.name, Kind.POLICY, folder, {})


def sampling(**settings: Any) -> SampleConfig:
    return SampleConfig(policy="sft", prompts="data", **settings)


OFF, ON = {"thinking": "off"}, {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (3, OFF, "thinking-changed: policy .'sft'. was trained with thoughts, and this stage turns thinking off"),
        (0, ON, "trained without thoughts, and this stage turns thinking on"),
        (3, ON, None),
        (0, OFF, None),
        (3, {"chat_template_kwargs": {"effort": "low"}}, None),
        (3, {}, None),
        (None, OFF, None),
    ],
)
def test_other_thinking_is_refused_by_name(
    refused: Refused, rows: int | None, settings: dict[str, Any], message: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    policy = trained(tmp_path / "sft", tiny_model, **({} if rows is None else {"thought_rows": rows}))
    inputs = {"policy": policy}
    if message is None:
        check_inputs(context(tmp_path / "next", inputs, config=sampling(**settings)), Kind.PREFERENCES)
        return
    refused(lambda: check_inputs(context(tmp_path / "next", inputs, config=sampling(**settings)), Kind.PREFERENCES))
    waived = context(tmp_path / "next", inputs, waive=["thinking-changed"], config=sampling(**settings))
    check_inputs(waived, Kind.PREFERENCES)


class Rollouts(Config):
    rollout_batch: int = 8


@pytest.mark.parametrize(("state", "thoughts"), [("on", True), ("off", False), (None, None)])
def test_rl_stage_has_thoughts_if_template_asks(
    state: Any, thoughts: bool | None, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "grpo" / "model"
    shutil.copytree(tiny_model, folder)
    template = folder / "chat_template.jinja"
    if state is not None:
        template.write_text(TemplateSettings(state).write(THINKING), encoding="utf-8")
    check_output(context(tmp_path / "grpo", {}, config=Rollouts()), "grpo", Kind.POLICY, {})
    facts = read_facts(folder)
    assert facts is not None and facts.thoughts is thoughts


def test_later_stages_inherit_trained_thoughts(tiny_model: Path, tmp_path: Path) -> None:
    sft = trained(tmp_path / "sft", tiny_model, thought_rows=3)
    rl = trained(tmp_path / "grpo", sft.model, {"policy": sft})
    facts = read_facts(rl.model)
    assert facts is not None and facts.thoughts is True
    dpo = trained(tmp_path / "dpo", rl.model, {"policy": rl}, thought_rows=0)
    facts = read_facts(dpo.model)
    assert facts is not None and facts.thoughts is False
