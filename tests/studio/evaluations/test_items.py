"""Items of an evaluation: wins and losses by pair and metric, words, answers, the judge's replies in both orders."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.studio.evaluations.items import EvaluationItems, ItemQuery

CARD = {
    "policies": ["sft", "ppo"],
    "reference": "sft",
    "primary": "gold",
    "tasks": {"duel": {"title": "Duel", "primary": "duel.win_rate", "metrics": ["duel.win_rate"], "kind": "judged"}},
    "metrics": {
        "gold": {"title": "Gold", "better": "higher"},
        "loss": {"title": "Loss", "better": "lower"},
        "duel.win_rate": {"title": "Win rate", "better": "higher"},
    },
}
GOLD = {"a": ([1.0, 0.0], [1.0, 1.0]), "b": ([1.0], [0.0]), "c": ([0.5], [0.5]), "d": ([0.5], [])}
"""Item → gold of the reference's and of ppo's samples."""


def sample(task: str, name: str, answers: dict[str, str], **columns: Any) -> dict[str, Any]:
    responses = {system: [{"text": text, "tokens": 3, "finished": True}] for system, text in answers.items()}
    prompt = [{"role": "user", "content": f"question {name}"}]
    return {"task": task, "id": name, "source": "s" + name, "prompt": prompt, "responses": responses, **columns}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scorecard.json").write_text(json.dumps(CARD), encoding="utf-8")
    samples = [sample("prompts", name, {"sft": f"the old {name}", "ppo": f"the new Straße {name}"}) for name in GOLD]
    samples += [sample("duel", name, {"sft": "plain", "ppo": "<b>bold</b>"}) for name in ("a", "x", "y")]
    values = [{"sft": {"gold": old, "loss": old}, "ppo": {"gold": new, "loss": new}} for old, new in GOLD.values()] + [
        {"ppo": {"win_rate": [rate]}} for rate in (1.0, 0.5, 0.0)
    ]
    items = [
        {"task": each["task"], "id": each["id"], "values": value} for each, value in zip(samples, values, strict=True)
    ]
    judgments = [
        {
            "task": "duel",
            "id": name,
            "one": "ppo",
            "other": "sft",
            "outcome": outcome,
            "orders": [
                {"shown": ["ppo", "sft"], "verdict": "first", "text": f"straight {name}"},
                {"shown": ["sft", "ppo"], "verdict": "second", "text": f"swapped {name}"},
            ],
        }
        for name, outcome in (("a", "one"), ("x", "disagreement"), ("y", "other"))
    ]
    write(tmp_path / "samples.jsonl", samples)
    write(tmp_path / "items.jsonl", items)
    write(tmp_path / "judgments.jsonl", judgments)
    return tmp_path


def outcomes(items: EvaluationItems, **query: Any) -> dict[str, str]:
    page = items.page(ItemQuery(first="ppo", second="sft", **query))
    return {f"{row['task']} {row['id']}": row["outcome"] for row in page["rows"]}


def test_outcomes_follow_metric_direction_and_pair(folder: Path) -> None:
    items = EvaluationItems.read(folder)
    gold = {"prompts a": "win", "prompts b": "loss", "prompts c": "tie", "prompts d": "none"}
    assert outcomes(items, task="prompts") == gold
    assert outcomes(items, task="prompts", metric="loss") == gold | {"prompts a": "loss", "prompts b": "win"}
    swapped = items.page(ItemQuery(first="sft", second="ppo", task="prompts", outcome="win"))
    assert [row["id"] for row in swapped["rows"]] == ["b"]
    assert swapped["outcomes"] == {"win": 1, "loss": 1, "tie": 1, "none": 1}
    # A win rate has one side in the file, and the opponent is the other.
    assert outcomes(items, task="duel") == {"duel a": "win", "duel x": "tie", "duel y": "loss"}
    assert outcomes(items)["duel a"] == "win"


def test_judge_outcomes_are_those_of_both_orders(folder: Path) -> None:
    items = EvaluationItems.read(folder)
    assert outcomes(items, task="duel", metric="judge") == {"duel a": "win", "duel x": "disagreement", "duel y": "loss"}
    swapped = items.page(ItemQuery(first="sft", second="ppo", task="duel", metric="judge", outcome="loss"))
    assert [row["id"] for row in swapped["rows"]] == ["a"]
    assert items.facts()["tasks"][1]["metrics"][0]["name"] == "judge"


def test_order_and_pages(folder: Path) -> None:
    items = EvaluationItems.read(folder)
    query = {"first": "ppo", "second": "sft", "task": "prompts"}
    assert [row["change"] for row in items.page(ItemQuery(**query))["rows"]] == [0.5, 0.0, -1.0, None]
    assert [row["id"] for row in items.page(ItemQuery(**query, descending=False))["rows"]] == ["b", "c", "a", "d"]
    page = items.page(ItemQuery(**query, sort="order", limit=2, offset=1))
    assert ([row["id"] for row in page["rows"]], page["matches"], page["total"]) == (["b", "c"], 4, 7)


@pytest.mark.parametrize(
    ("words", "matches"),
    [
        ("NEW", ["a", "b", "c", "d"]),
        ("straße b", ["b"]),
        ('"question c"', ["c"]),
        ("responses", []),
        ("tokens", []),
        ("<b>bold", ["a", "x", "y"]),
        ("a\\u00df", []),
    ],
)
def test_words_are_those_of_prompts_and_answers(folder: Path, words: str, matches: list[str]) -> None:
    page = EvaluationItems.read(folder).page(ItemQuery(words=words, sort="order"))
    assert [row["id"] for row in page["rows"]] == matches


def test_item_has_answers_differences_and_judgments(folder: Path) -> None:
    items = EvaluationItems.read(folder)
    item = items.item(4, "ppo", "sft")
    assert item is not None
    assert item["answers"]["ppo"][0]["text"] == "<b>bold</b>"
    assert [line["orders"][1]["text"] for line in item["judgments"]] == ["swapped a"]
    # Item a of the prompt set is another item.
    assert items.item(0)["judgments"] == []  # type: ignore[index]
    changed = items.item(0, "ppo", "sft")
    assert changed is not None
    assert changed["pieces"] == [("same", "the "), ("removed", "old "), ("added", "new Straße "), ("same", "a")]
    assert changed["values"]["ppo"]["gold"] == 1.0
    assert items.item(7) is None
    json.dumps(item, allow_nan=False)


def test_episode_and_numbers_by_token(folder: Path) -> None:
    line = sample("prompts", "e", {"sft": "end", "ppo": "end"})
    line["responses"]["sft"][0] |= {"token_kl": [["en", 0.5], ["d", float("nan")]], "explanation": {"judge": "good"}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "needle"}]
    line["responses"]["ppo"][0] |= {"messages": messages, "calls": [], "turns": [{}], "stop": "finished"}
    write(folder / "samples.jsonl", [line])
    items = EvaluationItems.read(folder)
    item = items.item(0)
    assert item is not None
    assert item["answers"]["sft"][0]["token_kl"] == [0.5, "nan"]
    assert item["answers"]["sft"][0]["explanation"] == {"judge": "good"}
    assert item["answers"]["ppo"][0]["conversation"]["entries"][0]["text"] == "needle"
    assert items.page(ItemQuery(words="needle"))["matches"] == 1


def test_damaged_lines_and_missing_files_are_skipped(folder: Path) -> None:
    path = folder / "samples.jsonl"
    path.write_text("{\n[1]\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "judgments.jsonl").unlink()
    items = EvaluationItems.read(folder)
    assert len(items.entries) == 7
    assert items.item(0)["answers"]["sft"][0]["text"] == "the old a"  # type: ignore[index]
    assert not items.facts()["has_judgments"]
    assert items.page(ItemQuery(words="question"))["matches"] == 7
