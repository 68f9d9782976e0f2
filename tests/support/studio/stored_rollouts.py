"""A store with a run whose stages have rollouts, episodes and an evaluation, all with hostile texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.store.rollouts import make_table
from align.store.store import Store
from tests.support.stored_rollouts import write_rollouts

PPO, EPISODES, EVALUATION = "a" * 64, "b" * 64, "c" * 64
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202egpj"
VISIBLE = HOSTILE.replace("\u202e", "\\u202e")
UPDATES, SAMPLES = 30, 4


def write_store(root: Path) -> Path:
    """Write the store and return its folder."""
    store = Store.open(root)
    stages = {
        "ppo": {"kind": "ppo", "key": PPO},
        "episodes": {"kind": "grpo", "key": EPISODES},
        "evaluate": {"kind": "evaluate", "key": EVALUATION},
    }
    store.remember_run("smoke", stages, {"stages": {}})
    for update in range(1, UPDATES + 1):
        rows = [rollout(update, index) for index in range(2 * SAMPLES)]
        write_rollouts(make_table(rows), store.folder("ppo", PPO) / "rollouts" / f"{update:06d}.parquet", {})
    running = store.partial("grpo", EPISODES) / "checkpoints" / "rollouts"
    write_rollouts(make_table([episode(index) for index in range(SAMPLES)]), running / "000001.parquet", {})
    write_evaluation(store.folder("evaluate", EVALUATION))
    return root


def rollout(update: int, index: int) -> dict[str, Any]:
    """Return a response with numbers by token; the first prompt asks hostile things."""
    group = index // SAMPLES
    words = ["The", " answer", " number", f" {index}", " of", f" update {update}", " is", f" {HOSTILE}", "."]
    count = len(words)
    is_right = (update + index) % 3 == 0
    return {
        "update": update,
        "round": 0,
        "index": index,
        "group": group,
        "prompt_id": f"prompt-{group}",
        "prompt": [{"role": "user", "content": f"Question {group}: {HOSTILE}"}],
        "response": "".join(words),
        "score": index + update / 10,
        "scores": {"math": float(is_right), HOSTILE: 0.5},
        "reasons": {} if is_right else {"math": "timed_out" if index == 1 else "unequal"},
        "explanation": {"math": {"reason": HOSTILE}},
        "tokens": count,
        "finished": index != 2,
        "learned": True,
        "kl": update * 0.01,
        "token_ids": list(range(count)),
        "token_texts": words,
        "response_mask": [True] * count,
        "learn_mask": [place != 1 for place in range(count)],
        "token_kl": [0.1 * place for place in range(count)],
        "values": [-0.2 * place for place in range(count)],
        "advantages": [(-1) ** place * 0.5 for place in range(count)],
    }


def episode(index: int) -> dict[str, Any]:
    """Return an episode with a call."""
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": f"<think>I think {HOSTILE}</think>I add."},
        {"role": "tool", "content": HOSTILE},
        {"role": "assistant", "content": "It is 4."},
    ]
    call = {"turn": 0, "name": "add", "arguments": {"a": 2}, "result": HOSTILE, "error": ""}
    columns = {"messages": messages, "calls": [call], "turns": 2, "turn_scores": [0.0, 1.0], "stop": "finished"}
    place = {"update": 1, "round": 0, "index": index, "group": 0, "prompt_id": "sum", "prompt": "2 + 2?"}
    return place | columns | {"response": "It is 4.", "score": 1.0, "tokens": 8, "finished": True}


def write_evaluation(folder: Path) -> None:
    """Write the files of an evaluation of two systems with a judge."""
    folder.mkdir(parents=True)
    metrics = {
        "gold": {"title": "Gold", "better": "higher"},
        "duel.win_rate": {"title": "Win rate", "better": "higher"},
    }
    tasks = {"duel": {"title": "Duel", "primary": "duel.win_rate", "metrics": ["duel.win_rate"], "kind": "judged"}}
    card = {"policies": ["sft", "ppo"], "reference": "sft", "primary": "gold", "tasks": tasks, "metrics": metrics}
    samples = []
    items = []
    for number in range(60):
        task = "duel" if number % 6 == 0 else "prompts"
        answers = {"sft": f"The old answer {number}.", "ppo": f"The new answer {number}. {HOSTILE}"}
        responses = {name: [{"text": text, "tokens": 5, "finished": True}] for name, text in answers.items()}
        prompt = [{"role": "user", "content": f"Question {number}? {HOSTILE}"}]
        line = {"task": task, "id": f"q{number}", "source": "questions"}
        samples.append({**line, "prompt": prompt, "responses": responses})
        gold = {"sft": {"gold": [0.5]}, "ppo": {"gold": [(number % 3) / 2]}}
        items.append({**line, "values": {"ppo": {"win_rate": [1.0]}} if task == "duel" else gold})
    orders = [
        {"shown": ["ppo", "sft"], "verdict": "first", "text": f"A is better. {HOSTILE}"},
        {"shown": ["sft", "ppo"], "verdict": "second", "text": "B is better. [[B]]"},
    ]
    judgment = {"task": "duel", "id": "q0", "one": "ppo", "other": "sft", "outcome": "one", "orders": orders}
    (folder / "scorecard.json").write_text(json.dumps(card), encoding="utf-8")
    for name, lines in (("samples", samples), ("items", items), ("judgments", [judgment])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
