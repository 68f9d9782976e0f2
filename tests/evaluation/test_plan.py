"""Compared checkpoints get the stage's settings of their chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

from align.evaluation.plan import make_policy
from align.models.chat.render import render_prompt
from align.models.chat.template_settings import TemplateSettings
from align.store.artifacts import Artifact, Kind
from tests.support.chat_templates import THINKING


def test_policy_has_template_settings_of_stage(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    artifact = Artifact("sft", Kind.POLICY, tmp_path, {"key": "k"})
    policies = {state: make_policy(artifact, TemplateSettings(state), "eval") for state in (None, "off", "on")}
    prompts = {}
    for state, policy in policies.items():
        ids = render_prompt(policy.tokenizer, [{"role": "user", "content": "Why?"}])
        prompts[state] = policy.tokenizer.decode(ids)
    assert prompts["off"] == prompts["on"] + "<think>\n\n</think>\n\n"
    assert prompts[None] == prompts["on"]
    # Cached answers of the checkpoint as it is must not be reused.
    assert policies[None].key == artifact.weights
    assert len({policy.key for policy in policies.values()}) == 3
