"""Tables of sampled responses: a few from every update, and the responses to a few prompts from every validation.

There is one JSON line per response and one file per update, so a resumed run overwrites the updates that it repeats.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.errors import shorten
from align.evaluation.score_validation.references import reference_of
from align.models.chat.render import token_texts
from align.rl.rollout import COMPONENT, Rollout
from align.rl.step_rewards import STEP_REWARDS
from align.store.json_files import write_text_atomically

FOLDER = "completions"
VALIDATIONS = "validations"
PER_TOKEN = ("kl", "values", "raw_advantages")


def write(folder: Path, rollout: Rollout, count: int, tokenizer: Any) -> None:
    """Write the first ``count`` responses of a rollout: ``update``, ``prompt``, ``response``, scores, length, KL.

    ``by_token`` has ``[text, KL to the reference, the critic's value before the token, advantage]`` of each token. It
    shows the tokens at which a response drifts, and the critic's expectation there.
    """
    path = folder / FOLDER / f"{rollout.update + 1:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(min(count, len(rollout))):
        response = {
            "update": rollout.update + 1,
            **_facts(rollout, index),
            "kl": float(rollout.tensors["kl"][index].sum()),
            "by_token": _by_token(rollout, index, tokenizer),
            **_step_rewards(rollout, index),
        }
        lines.append(json.dumps(response | _episode_fields(rollout, index), ensure_ascii=False) + "\n")
    write_text_atomically(path, "".join(lines))


def write_validation(folder: Path, rollout: Rollout, update: int, count: int) -> None:
    """Write the responses to the first ``count`` prompts of a validation after ``update`` updates.

    Every validation has the same prompts and seeds, so the lines show how the answers to a prompt change.
    """
    if not count:
        return
    path = folder / VALIDATIONS / f"{update:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = rollout.tensors
    kl = ((tensors["logprobs"] - tensors["ref_logprobs"]) * tensors["response_mask"]).double().sum(dim=1)
    lines = []
    for index in range(min(count, len(rollout))):
        response = {"update": update, **_facts(rollout, index), "kl": float(kl[index])}
        lines.append(json.dumps(response | _episode_fields(rollout, index), ensure_ascii=False) + "\n")
    write_text_atomically(path, "".join(lines))


def example(rollout: Rollout) -> str:
    """Return the first response of a rollout with its score, and its row's reference answer if there is one."""
    reference, score = reference_of(rollout.rows[0]), float(rollout.tensors["scores"][0])
    prefix = "" if reference is None else f"reference {shorten(repr(reference))}, "
    return f"{prefix}response {shorten(repr(rollout.texts[0]))}, score {score:g}."


def _facts(rollout: Rollout, index: int) -> dict[str, Any]:
    """Return prompt, response, scores and length."""
    tensors = rollout.tensors
    components = {name: float(tensors[name][index]) for name in tensors if name.startswith(COMPONENT)}
    scores = {name: value for name, value in components.items() if math.isfinite(value)}
    gold = {"gold": float(tensors["gold"][index])} if "gold" in tensors else {}
    return {
        "prompt": rollout.rows[index]["prompt"],
        "response": rollout.texts[index],
        "score": float(tensors["scores"][index]),
        **scores,
        **_explanation(rollout, index),
        **gold,
        "tokens": len(rollout.responses[index]),
        **_thought_facts(rollout, index),
        "finished": bool(tensors["finished"][index]),
    }


def _explanation(rollout: Rollout, index: int) -> dict[str, Any]:
    """Return the reasons of judges for a score; empty without any."""
    explanation = rollout.explanations[index] if rollout.explanations else {}
    return {"explanation": explanation} if explanation else {}


def _thought_facts(rollout: Rollout, index: int) -> dict[str, Any]:
    """Return the place of a response's thought; empty for an episode, and for a response without a thought."""
    if not rollout.has_thoughts or rollout.episodes is not None or not rollout.tensors["thought_tokens"][index]:
        return {}
    return {
        "thought_tokens": int(rollout.tensors["thought_tokens"][index]),
        "thought_end": int(rollout.tensors["thought_end"][index]),
        "open_thought": bool(rollout.tensors["open_thought"][index]),
    }


def _episode_fields(rollout: Rollout, index: int) -> dict[str, Any]:
    """Return the conversation, calls and scores by turn of an episode, and which of its tokens the policy sampled."""
    if rollout.episodes is None:
        return {}
    episode = rollout.episodes[index]
    return {
        "messages": episode.messages,
        "calls": [asdict(call) for call in episode.calls],
        "turns": len(episode.turns),
        "turn_scores": episode.turn_scores,
        "stop": episode.stop,
        "failure": episode.failure,
        "sampled": episode.mask,
    }


def _step_rewards(rollout: Rollout, index: int) -> dict[str, Any]:
    """Return ``[token, score]`` for the last token of each step with a score; empty if steps have none."""
    if STEP_REWARDS not in rollout.tensors:
        return {}
    rewards = rollout.tensors[STEP_REWARDS][index].tolist()
    return {"step_rewards": [[token, reward] for token, reward in enumerate(rewards) if reward]}


def _by_token(rollout: Rollout, index: int, tokenizer: Any) -> list[list[Any]]:
    ids = rollout.responses[index]
    columns = []
    for name in PER_TOKEN:
        if name in rollout.tensors:
            columns.append(rollout.tensors[name][index].tolist()[: len(ids)])
        else:  # a method without a critic has no values
            columns.append([0.0] * len(ids))
    rows = zip(token_texts(tokenizer, ids), *columns, strict=True)
    return [[text, *(round(value, 4) for value in numbers)] for text, *numbers in rows]


def gather(folder: Path, output: Path) -> None:
    """Concatenate the files of all updates into ``completions.jsonl`` and ``validations.jsonl`` of ``output``."""
    for name in (FOLDER, VALIDATIONS):
        files = sorted((folder / name).glob("*.jsonl"))
        if files:
            text = "".join(file.read_text(encoding="utf-8") for file in files)
            write_text_atomically(output / f"{name}.jsonl", text)
