"""The rules that a player makes of an environment's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.environment import EnvironmentConfig
from align.environments.environment_player import EnvironmentPlayer
from align.environments.sources import open_environment
from align.models.loading import load_tokenizer
from tests.support.environments.buttons import FORMAT, TEMPLATE

BUTTONS = {"class": "tests.support.environments.buttons:Buttons", "tool_format": FORMAT, "max_tokens": 60}


@pytest.mark.parametrize(("fields", "most"), [({"turn_max_tokens": 8}, 8), ({}, 60)])
def test_turn_limit_defaults_to_the_limit_of_the_episode(fields: dict[str, Any], most: int, tiny_model: Path) -> None:
    config = EnvironmentConfig.model_validate(BUTTONS | fields)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = TEMPLATE
    player = EnvironmentPlayer(config, open_environment(config), tokenizer, 64, "test")
    try:
        assert (player.rules.turn_max_tokens, player.rules.max_tokens) == (most, 60)
    finally:
        player.close()
