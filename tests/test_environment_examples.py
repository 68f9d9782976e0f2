"""The shipped environments: what they tell the model, and what they score."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from align.config.environment import EnvironmentConfig
from align.config.runtime import EngineConfig, Runtime
from align.environments.environment import EnvironmentSource
from align.environments.player import EnvironmentPlayer, EpisodeTask
from align.environments.results import Scores, Step, ToolError
from align.environments.sources import open_environment
from align.environments.user_models import CheckpointUser
from align.inference.engine import open_transformers
from align.models.loading import load_tokenizer
from examples import calculator, guess_the_number, shop
from tests.support.environments.opened import open_block
from tests.support.environments.talker import make_talker

ROW = {"id": "1", "prompt": [{"role": "user", "content": "What is 12 * 12?"}], "answer": "#### 144"}


def said(text: str) -> list[dict[str, Any]]:
    return [*ROW["prompt"], {"role": "assistant", "content": text}]  # type: ignore[misc]


def opened(name: str, **fields: Any) -> EnvironmentSource:
    return open_block({"class": f"examples.{name}"} | fields)


def test_a_calculator_answers_and_scores() -> None:
    source = opened("calculator:Calculator", arguments={"call_reward": 0.5})
    assert [schema["function"]["name"] for schema in source.tools] == ["calculate"]
    assert source.can_save and not source.has_step
    environment = source.make()
    assert environment.reset(ROW) == [{"role": "user", "content": "What is 12 * 12?"}]
    assert environment.score(said("It is 144.")) == Scores(1.0, {"right": 1.0, "called": 0.0})
    assert environment.call("calculate", {"expression": "12*12"}) == "144"
    assert environment.score(said("It is 12.")) == Scores(0.5, {"right": 0.0, "called": 0.5})
    other = source.make()
    assert other.restore(ROW, [], environment.state()) == 0
    assert other.score(said("144 it is")).total == 1.5


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("(12 + 3) * 4", "60"),
        ("-7 // 2", "-4"),
        ("7 / 2", "3.5"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("2 ** 10", "ValueError: only numbers, + - * / // % and brackets are allowed"),
        ("__import__('os')", "ValueError: only numbers, + - * / // % and brackets are allowed"),
        ("1 +", "ValueError: this is no arithmetic expression"),
        ("(" * 150, "ValueError: this is no arithmetic expression"),
        ("1+" * 150, "ValueError: the expression has more than 200 characters"),
        ("True + 1", "ValueError: only numbers, + - * / // % and brackets are allowed"),
    ],
)
def test_a_calculator_takes_arithmetic_alone(expression: str, result: str) -> None:
    environment = opened("calculator:Calculator").make()
    environment.reset(ROW)
    try:
        text = environment.call("calculate", {"expression": expression})
    except ToolError as error:
        text = str(error)
    assert text == result


def test_products_are_different_and_right() -> None:
    records = list(calculator.products(count=50))
    assert len({record["question"] for record in records}) == 50
    for record in records:
        question = record["question"].removeprefix("What is ").removesuffix("?")
        assert calculator.evaluate(question) == calculator.last_number(record["answer"])


def test_functions_search_and_calculate() -> None:
    source = open_block(
        {"tools": ["examples.tools:search", "examples.tools:calculate"], "score": "examples.tools:right_answer"}
    )
    environment = source.make()
    row = ROW | {"answer": "1000"}
    environment.reset(row)
    assert environment.call("search", {"query": "How high is the Eiffel Tower"}).startswith("The Eiffel Tower is 330")
    assert environment.call("search", {"query": "zebra"}) == "Nothing was found."
    assert environment.call("calculate", {"expression": "330 + 670"}) == "1000"
    assert environment.score(said("1,000 metres")) == Scores(1.0, {"right": 1.0, "asked": 0.0})
    asked = [*said(""), {"role": "tool", "content": "1000"}, {"role": "assistant", "content": "1000"}]
    assert environment.score(asked) == Scores(1.1, {"right": 1.0, "asked": 0.1})


def test_a_number_is_guessed_by_its_hints() -> None:
    environment = opened("guess_the_number:GuessTheNumber").make()
    assert environment.reset({"id": "1", "secret": 30}) is None
    for message, answer in [("25?", "Higher."), ("40", "Lower."), ("I say 31", "Lower."), ("no idea", "Say a number")]:
        step = environment.step(message)
        assert not step.done and step.messages[0]["content"].startswith(answer)
    assert environment.step("30") == Step([], True)
    assert environment.score([]).turns == [0.1, 0.0, 0.1, -0.1, 1.0]


def test_a_secret_is_drawn_from_the_row() -> None:
    games = list(itertools.islice(guess_the_number.games(), 20))
    assert all(1 <= game["secret"] <= 50 for game in games)
    first, second = guess_the_number.GuessTheNumber(), guess_the_number.GuessTheNumber()
    first.reset({"id": "x"})
    second.reset({"id": "x"})
    assert first.secret == second.secret and 1 <= first.secret <= 50


# ---- a shop whose customer is a model ----

VISIT = next(iter(shop.visits(count=1, seed=3)))


def test_a_shop_is_left_as_the_customer_wants() -> None:
    source = opened("shop:Shop", user={"model": "sft", "prompt": "{goal}"})
    assert [schema["function"]["name"] for schema in source.tools] == ["find_orders", "cancel_order", "send_to"]
    assert source.can_save and not source.has_step
    environment = source.make()
    assert environment.reset(VISIT) is None
    name = VISIT["orders"][0]["customer"]
    assert json.loads(environment.call("find_orders", {"customer": f" {name.upper()}"})) == VISIT["orders"]
    assert environment.call("find_orders", {"customer": "Zoe"}) == "There are no orders under this name."
    assert environment.score([]) == Scores(0.0, {"right": 0.0})
    with pytest.raises(ToolError, match="ValueError: there is no order 1"):
        environment.call("cancel_order", {"number": "1"})
    number = VISIT["orders"][0]["number"]
    if VISIT["wanted"][number] == shop.CANCELLED:
        environment.call("cancel_order", {"number": number})
    else:
        environment.call("send_to", {"number": number, "city": VISIT["wanted"][number]})
    assert environment.score([]).total == 1.0
    other = source.make()
    assert other.restore(VISIT, [], environment.state()) == 0
    assert other.score([]).total == 1.0
    other.call("cancel_order", {"number": VISIT["orders"][1]["number"]})
    assert other.score([]).total == 0.0


def test_every_visit_can_be_fulfilled_and_its_goal_says_how() -> None:
    visits = list(shop.visits(count=40, seed=1))
    wishes = {"cancel": 0, "send": 0}
    for visit in visits:
        changed = [order for order in visit["orders"] if visit["wanted"][order["number"]] != order["place"]]
        assert len(changed) == 1 and changed[0]["item"] in visit["goal"] and changed[0]["customer"] in visit["goal"]
        target = visit["wanted"][changed[0]["number"]]
        wishes["cancel" if target == shop.CANCELLED else "send"] += 1
        assert target == shop.CANCELLED or f"sent to {target}" in visit["goal"]
        assert changed[0]["number"] not in visit["goal"]  # the policy has to look it up
    assert min(wishes.values()) > 10


def test_a_model_plays_the_customer(tiny_model: Path, tmp_path: Path) -> None:
    talker = make_talker(tiny_model, tmp_path / "talker", ["ok", "no", "bye"])
    block = {
        "class": "examples.shop:Shop",
        "user": {"model": "sft", "prompt": "{goal} Say bye when it is done.", "stop": "bye", "max_tokens": 8},
        "tool_format": "regex:(?P<name>no such call)(?P<arguments>)",
        "max_turns": 3,
        "max_tokens": 120,
        "turn_max_tokens": 8,
    }
    config = EnvironmentConfig.model_validate(block)
    assert config.user is not None
    runtime = Runtime(device="cpu", engine=EngineConfig(name="transformers"), threads=1)
    user = CheckpointUser(config.user, talker, runtime, "float32", where="test")
    player = EnvironmentPlayer(config, open_environment(config), load_tokenizer(talker), 200, "test", user)
    rows = [visit | {"id": str(number)} for number, visit in enumerate(shop.visits(count=8))]
    player.check_rows(rows)
    engine = open_transformers(talker, runtime, "float32")
    tasks = [EpisodeTask(row, number) for number, row in enumerate(rows)]
    episodes = player.play(engine, tasks, temperature=1.0)
    player.close()
    engine.close()
    talked = [episode for episode in episodes if episode.user_answers]
    assert talked and all(episode.score == 0.0 for episode in episodes if episode.stop != "failed")
    assert {"finished"} <= {episode.stop for episode in episodes}
