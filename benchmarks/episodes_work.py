"""Work of both sides of ``episodes``: prompts, an environment with a tool, and a script of every turn.

    python -m benchmarks.episodes_work SHAPE FOLDER   (called by episodes; SHAPE as JSON)

A model that has not learned to call tools calls none, so turns follow a script, drawn once for both sides: a turn is
sampled to the length that the script gives it, and its last tokens are then replaced by a tool call, or by the end of
the turn. So are tokens of which the model may have begun a call of its own. Calls are parsed, tools run and results are
rendered by each side as always. Torch-free at import.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from benchmarks.ppo_work import Shape, load_work_tokenizer

TEMPLATE = "chatml-tools"
"""Chat template of both sides, by name."""
WORDS = ("red", "green", "blue", "house", "water", "paper", "music", "river", "stone", "light", "garden", "winter")
SHELVES = 1000
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Sizes of the model of ``--tiny``, with heads of 32, which vLLM's attention on a CPU needs."""


@dataclass(frozen=True)
class EpisodeShape:
    """Size of the work to play; ``updates`` counts the warm-up too."""

    batch: int = 16
    """Episodes of an update."""
    samples: int = 4
    """Episodes of a prompt."""
    turns: int = 3
    """Turns of an episode, at most."""
    tokens: int = 64
    """Sampled tokens of a turn, at most."""
    result_words: int = 12
    tool_seconds: float = 0.0
    lengths: str = "mixed"
    micro_batch: int = 8
    updates: int = 3
    tiny: bool = False
    seed: int = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of an episode after its prompt, more than there can be: a word has at most four."""
        return self.turns * self.tokens + (self.turns - 1) * (4 * self.result_words + 24)


@dataclass(frozen=True)
class Markup:
    """Tokens of which a model may happen to write a call, which would be none of the script's."""

    ids: frozenset[int] = frozenset()
    filler: int = 0
    """Token that stands in their place."""

    @classmethod
    def of(cls, tokenizer: Any) -> Markup:
        """Return the tokens with ``<`` and the special tokens."""
        opening = {id for token, id in tokenizer.get_vocab().items() if "<" in token}
        filler = tokenizer("a", add_special_tokens=False)["input_ids"][0]
        return cls(frozenset(opening | set(tokenizer.all_special_ids)), filler)


NO_MARKUP = Markup()


@dataclass(frozen=True)
class ScriptedTurn:
    """A turn of ``length`` tokens, the last of which are ``tail``: a call and the end of the turn."""

    length: int
    tail: list[int]

    @property
    def sampled(self) -> int:
        """Tokens that stay as they were sampled."""
        return self.length - len(self.tail)

    def complete(self, sampled: Sequence[int], markup: Markup = NO_MARKUP) -> list[int]:
        """Return the turn, out of at least ``length`` sampled tokens, with ``markup`` replaced."""
        if len(sampled) < self.length:
            raise RuntimeError(f"a turn has {len(sampled)} sampled tokens; the script has {self.length}")
        tokens = [markup.filler if token in markup.ids else token for token in sampled[: self.sampled]]
        return [*tokens, *self.tail]


Script = list[list[ScriptedTurn]]
"""The turns of each episode of an update."""


class Shelf:
    """A shelf that a tool looks things up on; shared by the environments of both sides."""

    def __init__(self, words: int, seconds: float) -> None:
        """Take how many words a result has, and how long the tool sleeps."""
        self._words, self._seconds = words, seconds
        self._looked_up: list[int] = []

    def look_up(self, shelf: int) -> str:
        """Say what lies on a shelf.

        Args:
            shelf: Number of the shelf.
        """
        if self._seconds:
            time.sleep(self._seconds)
        self._looked_up.append(shelf)
        return describe(shelf, self._words)

    def _value(self) -> float:
        # Differs within a group of episodes: equal scores would teach nothing.
        return float(sum(self._looked_up)) / SHELVES


class ShelfEnvironment(Shelf):
    """align's environment."""

    def reset(self, row: dict[str, Any]) -> None:
        """Begin; the row's prompt is the first message."""
        self._looked_up = []

    def score(self) -> float:
        """Return the sum of what was looked up."""
        return self._value()


def describe(shelf: int, words: int) -> str:
    """Return the result of the tool: the same words for the same shelf."""
    return " ".join(WORDS[(shelf * 7 + index * (1 + shelf % 5)) % len(WORDS)] for index in range(words))


def call_text(shelf: int) -> str:
    """Return a call as the chat template writes it."""
    return f'<tool_call>{{"name": "look_up", "arguments": {{"shelf": {shelf}}}}}</tool_call>'


def turn_sizes(shape: EpisodeShape, least: int) -> list[list[list[int]]]:
    """Draw the tokens of each turn of each episode of each update; ``least`` is the shortest turn that holds a call.

    ``full``: all turns of the greatest length. ``mixed``: two turns to the most, each of any length from ``least``, and
    one episode of an update is full. Raises ``UserError`` for turns that hold no call.
    """
    if shape.tokens < least:
        raise UserError(f"--tokens {shape.tokens}: a turn with a call has at least {least} tokens.")
    rng = random.Random(f"{shape.seed}:turns")
    longest = [shape.tokens] * shape.turns
    updates = []
    for _ in range(shape.updates):
        episodes = [longest] * shape.batch
        if shape.lengths == "mixed":
            episodes = [
                [rng.randint(least, shape.tokens) for _ in range(rng.randint(min(2, shape.turns), shape.turns))]
                for _ in range(shape.batch)
            ]
            episodes[rng.randrange(shape.batch)] = longest
        updates.append(episodes)
    return updates


def make_script(shape: EpisodeShape, tokenizer: Any) -> list[Script]:
    """Return the turns of every update: all but an episode's last one call the tool."""
    end = [int(tokenizer.eos_token_id)]
    calls = [
        [*tokenizer(call_text(shelf), add_special_tokens=False)["input_ids"], *end] for shelf in range(100, SHELVES)
    ]
    rng = random.Random(f"{shape.seed}:calls")
    sizes = turn_sizes(shape, least=max(map(len, calls)) + 1)
    return [
        [
            [ScriptedTurn(size, rng.choice(calls)) for size in turns[:-1]] + [ScriptedTurn(turns[-1], end)]
            for turns in episodes
        ]
        for episodes in sizes
    ]


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return different prompts."""
    from align.data.families.embedded import generate

    return [{"prompt": [{"role": "user", "content": row["prompt"][-1]["content"]}]} for row in generate(count, seed)]


def make_tiny_model(source: Path, folder: Path) -> Path:
    """Write a two-layer model of random weights with the tokenizer of ``source``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {**TINY, "num_key_value_heads": TINY["num_attention_heads"], "head_dim": 32}
    config = AutoConfig.from_pretrained(source, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def prepare(shape: EpisodeShape, folder: Path) -> None:
    """Write ``work.json``, with rows in the order in which align's trainer draws them."""
    from align.models.built_in import fetch
    from align.rl.prompts import Prompts

    model = fetch()
    if shape.tiny:
        model = folder / "tiny"
        if not model.is_dir():
            make_tiny_model(fetch(), model)
    tokenizer = load_tokenizer(model)
    count = shape.batch // shape.samples * shape.updates
    rows = make_rows(count, shape.seed)
    order = Prompts(rows, tokenizer, None).draw(0, count, shape.seed)
    script = [[[asdict(turn) for turn in turns] for turns in episodes] for episodes in make_script(shape, tokenizer)]
    work = {"shape": asdict(shape), "model": str(model), "rows": rows, "order": order, "script": script}
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")


def load_tokenizer(model: Path) -> Any:
    """Return the model's tokenizer with the chat template of both sides."""
    return load_work_tokenizer(model, Shape(template=TEMPLATE))


def read_work(path: Path) -> dict[str, Any]:
    """Return the work, with its ``EpisodeShape`` and scripts."""
    work: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    script = [[[ScriptedTurn(**turn) for turn in turns] for turns in episodes] for episodes in work["script"]]
    return work | {"shape": EpisodeShape(**work["shape"]), "script": script, "model": Path(work["model"])}


def count_calls(script: Script) -> int:
    """Return the calls of an update."""
    return sum(len(turns) - 1 for turns in script)


if __name__ == "__main__":
    prepare(EpisodeShape(**json.loads(sys.argv[1])), Path(sys.argv[2]))
