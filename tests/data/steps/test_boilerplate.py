"""Stock phrases: every rule finds its examples, and no rule finds any rule's counter-examples."""

import gzip
import json
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from align.config.recipe.filter_settings import Boilerplate, FilterStep
from align.data.rows import assistant
from align.data.steps.boilerplate import rules
from align.data.steps.step_identities import step_identities
from tests.support.data.steps.rows_for_steps import instruction, pair, reason, run

RULES = {rule.name: rule for rule in rules()}
INNOCENT = [text for rule in rules() for text in rule.passes]


@pytest.mark.parametrize("name", RULES)
def test_each_rule_finds_its_examples(name):
    rule = RULES[name]
    assert len(rule.finds) >= 3 and len(rule.passes) >= 2
    for text in rule.finds:
        for spelled in (text, text.upper(), text.replace("'", "’")):
            assert rule.search(spelled, spelled.lower()), spelled


@pytest.mark.parametrize("name", RULES)
def test_no_rule_finds_an_innocent_text(name):
    rule = RULES[name]
    for text in INNOCENT:
        assert not rule.search(text, text.lower()), text


@pytest.mark.parametrize("name", RULES)
def test_words_that_rules_need_do_not_hide_anything(name):
    rule = RULES[name]
    assert all(word == word.lower() for word in rule.needs)
    if rule.position == "start":
        assert not rule.needs
    else:  # a refusal in the middle of a text is found, one at its start by ``match`` is not
        assert rule.search("So it is. " + rule.finds[0], ("So it is. " + rule.finds[0]).lower())


def test_a_refusal_counts_at_the_start_only():
    assert reason(instruction(answer="I'm sorry, but I can't help with that."), boilerplate={}) == "filter: refusal"
    assert reason(instruction(answer='"Oh, I’m sorry, I cannot assist you."'), boilerplate={}) == "filter: refusal"
    story = "Anna put down the phone. She had asked twice.\n\n" + "x" * 300 + " I'm sorry, but I can't help with that."
    assert reason(instruction(answer=story), boilerplate={}) is None


def test_kinds_are_chosen():
    text = "As an AI language model, I was trained by OpenAI."
    assert reason(instruction(answer=text), boilerplate={}) == "filter: self_reference"
    assert reason(instruction(answer=text), boilerplate={"kinds": ["developer"]}) == "filter: developer"
    assert reason(instruction(answer=text), boilerplate={"kinds": ["refusal"]}) is None


def test_what_was_found_is_told():
    (result,) = run([instruction(answer="Well. " * 30 + "As an AI, I cannot eat. More.")], boilerplate={})
    assert result.detail["rule"] == "as an AI"
    assert result.detail["in"] == "completion"
    assert "As an AI, I" in result.detail["excerpt"]
    assert len(result.detail["excerpt"]) < 200


def test_a_refusal_that_was_rejected_drops_nothing():
    refusal, answer = "I'm sorry, but I can't help with that.", "Boil the water first."
    assert reason(pair(answer, refusal), boilerplate={}) is None
    assert reason(pair(answer, refusal), boilerplate={}, sides="both") == "filter: refusal"
    assert reason(pair(refusal, answer), boilerplate={}) == "filter: refusal"
    assert reason(instruction(answer=refusal, label=False), boilerplate={}) is None
    assert reason(instruction(answer=refusal, label=True), boilerplate={}) == "filter: refusal"


@pytest.mark.parametrize(
    ("responses", "dropped"),
    [
        ([("ok", None, 1), ("I can't help with that.", None, 0)], True),
        ([("ok", None, 0), ("I can't help with that.", None, 1)], False),
        ([("ok", 1.0, None), ("I can't help with that.", 2.0, None)], True),
        ([("ok", 2.0, None), ("I can't help with that.", 1.0, None)], False),
        ([("ok", None, None), ("I can't help with that.", None, None)], False),
    ],
)
def test_of_several_responses_the_best_counts(responses, dropped):
    row = instruction(responses=[{"content": c, "score": s, "rank": r} for c, s, r in responses])
    del row["completion"]
    assert (reason(row, boilerplate={}) is not None) == dropped
    assert reason(row, boilerplate={}, sides="both") == "filter: refusal"


def test_earlier_turns_do_not_count():
    refusal = assistant("I'm sorry, but I can't help with that.")
    row = instruction()
    assert reason(row | {"prompt": [*row["prompt"], refusal, *row["prompt"]]}, boilerplate={}) is None


def test_patterns_of_ones_own():
    row = instruction(answer="Visit ACME today.")
    assert reason(row, boilerplate={"patterns": [r"\bacme\b"]}) == "filter: pattern"
    assert reason(row, boilerplate={}) is None
    with pytest.raises(ValidationError, match="is not a regular expression"):
        Boilerplate(patterns=["("])


def test_the_key_holds_the_rules(monkeypatch):
    step = FilterStep(type="filter", boilerplate={})
    before = step_identities(step, Path())
    monkeypatch.setattr("align.data.steps.boilerplate._rules_text", lambda: "{}")
    assert step_identities(step, Path()) != before


def test_hostile_texts_take_no_time():
    texts = ["sorry " * 20_000, "as an ai " * 20_000, "i am an " * 20_000 + "language model", "I " * 60_000]
    start = time.process_time()
    run([instruction(answer=text) for text in texts], boilerplate={})
    assert time.process_time() - start < 5


def test_dolly_was_written_by_people_and_harmless_replies_refuse(shared_data: Path):
    people = json.loads((shared_data / "dolly-3k" / "dolly_3k.json").read_text(encoding="utf-8"))
    assert not [r for r in people if r["output"] and reason(instruction(answer=r["output"]), boilerplate={})]
    with gzip.open(shared_data / "hh-rlhf" / "harmless-base.test.jsonl.gz", "rt", encoding="utf-8") as file:
        chosen = [json.loads(line)["chosen"].rpartition("\n\nAssistant:")[2].strip() for line in file]
    actual = [text for text in chosen if reason(instruction(answer=text), boilerplate={}) is not None]
    assert 40 <= len(actual) <= 60  # 49 when this was written, each of them read
