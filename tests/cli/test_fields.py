"""``align fields``: every field of every stage and block in 80 columns, and the nearest name for a slip."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from align.cli.fields import topic_blocks
from align.cli.main import main
from align.pipeline.registry import STAGES
from align.registry import Topic, registered

Show = Callable[..., str]
TOPICS = registered(Topic)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> str:
        code = main(["fields", *arguments])
        captured = capsys.readouterr()
        assert code == (2 if captured.err else 0)
        return captured.out or captured.err

    return run


def test_without_a_kind_all_are_listed(show: Show) -> None:
    lines = show().splitlines()
    for kind in [*STAGES, *TOPICS]:
        assert any(line.startswith(f"  {kind} ") for line in lines), kind
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("kind", [*STAGES, *TOPICS])
def test_every_field_of_a_kind_is_shown_in_80_columns(kind: str, show: Show) -> None:
    text = show(kind)
    assert max(map(len, text.splitlines())) <= 80
    assert "`" not in text
    blocks = topic_blocks(TOPICS[kind]) if kind in TOPICS else [STAGES[kind].config_class()]
    words = [line.split() for line in text.splitlines() if line and not line.startswith(" ")]
    shown = [line[0] for line in words if line[1:2] in (["="], ["(required)"])]
    for block in blocks:
        selecting = {name for name, field in block.model_fields.items() if f"{name}: {field.default}" in text}
        assert set(block.model_fields) - selecting <= set(shown), block


def test_a_field_has_type_default_bounds_and_meaning(show: Show) -> None:
    assert show("ppo", "clip_range") == (
        "clip_range = 0.2\n"
        "    number; > 0, < 1\n"
        "    Clip range of a token's probability ratio around 1.\n"
    )  # fmt: skip
    text = show("ppo", "learning_rate")
    assert text.startswith("learning_rate = auto\n    auto or number; > 0, ≤ 1\n    Learning rate of the policy.")
    assert "name of a stage that makes RewardCheckpoint" in show("ppo", "reward")


def test_fields_inside_blocks(show: Show) -> None:
    tuning = show("ppo", "tuning")
    assert "block with method: full, lora, qlora, ia3, peft, prefix, prompt, p_tuning or\n" in tuning
    assert "\nmethod: qlora\n" in tuning and "\nquantization = nf4\n" in tuning
    rank = show("ppo", "tuning.rank")
    assert rank.startswith("With method: lora or method: qlora:\nrank = 16\n    integer; ≥ 1, ≤ 1024\n")
    assert rank.count("rank = 16") == 1
    assert show("runtime", "engine.gpu_memory").startswith("gpu_memory = auto\n")
    assert "max_tokens = 1280" in show("evaluate", "tasks.mine.max_tokens")
    assert show("runtime", "stages.sft.engine.name") == show("runtime", "engine.name")


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["recipe", "cap"], "recipe cap\n\ntype: cap\n"),
        (["recipe", "steps.cap"], "recipe steps.cap\n\ntype: cap\n"),
        (["evaluate", "tasks.gsm8k"], "evaluate tasks.gsm8k\n\n"),
        (["sft", "lora"], "sft lora\n\nmethod: lora\n"),
    ],
)
def test_value_that_selects_a_block_shows_the_block(arguments: list[str], start: str, show: Show) -> None:
    assert show(*arguments).startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pop"], "align fields: there is no kind 'pop'. Did you mean 'ppo'?"),
        (["zzzz"], "there is no kind 'zzzz'. Known here: artifact, cpo,"),
        (["sft", "epoch"], "align fields sft epoch: there is no field 'epoch'. Did you mean 'epochs'?"),
        (["sft", "lr"], "there is no field 'lr'. In align this is 'learning_rate'."),
        (["sft", "tuning.rnk"], "align fields sft tuning.rnk: there is no field 'rnk'. Did you mean 'rank'?"),
        (["sft", "tunig.rank"], "there is no field 'tunig'. Did you mean 'tuning'?"),
        (["sft", "adam_beta2"], "It goes under 'trainer': `trainer: {adam_beta2: …}`."),
        (["sft", "epochs.x"], "align fields sft epochs.x: 'epochs' has a value, and no fields below it."),
        (["nowhere.stage:STAGE"], "'nowhere.stage:STAGE': there is no module 'nowhere'"),
    ],
)
def test_a_slip_is_answered(arguments: list[str], message: str, show: Show) -> None:
    assert message in show(*arguments)


def test_a_stage_of_the_users_own(show: Show) -> None:
    assert "\nscale = 1.0\n    number; > 0\n" in show("tests.support.toy:SUM")


def test_json(show: Show) -> None:
    assert set(json.loads(show("--json"))["stages"]) == set(STAGES)
    (block,) = json.loads(show("sft", "--json"))
    assert {field["name"] for field in block["fields"]} == set(STAGES["sft"].config_class().model_fields)
    document = json.loads(show("ppo", "tuning.rank", "--json"))
    assert document["fields"][0] == {
        "block": "method: lora",
        "name": "rank",
        "is_required": False,
        "type": "integer",
        "default": "16",
        "bounds": "≥ 1, ≤ 1024",
        "meaning": "Rank of each update; a higher rank has more capacity and needs more memory.",
    }
