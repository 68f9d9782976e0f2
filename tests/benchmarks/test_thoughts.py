"""What ``benchmarks.thoughts`` does without a checkpoint: changed thoughts, and the table of answers."""

import random

from benchmarks.thoughts import Condition, Question, donors, make_thoughts, parse, shuffle, strip_marks, table, truncate

QUESTIONS = [
    Question("sums", "3", ["1+1=2", "2+1=3"], "3"),
    Question("ranks", "9", ["4", "9"], "9"),
    Question("sums", "5", ["1+1=2", "2+3=5"], "4"),
    Question("sums", "3", ["2+0=2", "2+1=3"], "3"),
]


def test_shuffled_thought_ends_with_another_line():
    lines = ["a", "b", "c", "c"]
    for seed in range(20):
        changed = shuffle(lines, random.Random(seed))
        assert sorted(changed) == sorted(lines) and changed[-1] != "c"
    assert shuffle(["a", "a"], random.Random(0)) == ["a", "a"]
    assert truncate(lines) == ["a", "b"] and truncate(["a"]) == []


def test_foreign_thought_has_the_task_and_another_answer():
    # The first and the last sum have the same answer; no other rank has another answer than its own.
    assert [donor.own for donor in donors(QUESTIONS)] == ["4", "9", "3", "4"]
    thoughts, owners = make_thoughts(QUESTIONS)["foreign"]
    assert thoughts[0] == ["1+1=2", "2+3=5"] and owners[0] is QUESTIONS[2]
    assert make_thoughts(QUESTIONS)["empty"][0] == [[], [], [], []]
    assert make_thoughts(QUESTIONS)["shuffled"] == make_thoughts(QUESTIONS)["shuffled"]


def test_marks_of_a_thought_are_removed():
    assert strip_marks("<think>\n1+1=2\n\n2+1=3\n</think>\n\n") == ["1+1=2", "", "2+1=3"]
    assert strip_marks("<think></think>") == strip_marks("") == []


def test_table_counts_right_unchanged_and_foreign_answers():
    owners = donors(QUESTIONS)
    lines = table([Condition("foreign", QUESTIONS, ["4", "9", "5", "3"], owners)])
    assert len(lines) == 4
    assert lines[2].startswith("| ranks, 1 | foreign | 1.00 (") and lines[2].count("1.00 (0.21 to 1.00)") == 3
    # sums: right answers 3, 5, 3; own answers 3, 4, 3; answers of the owners 4, 3, 4; given 4, 5, 3
    cells = [cell.strip().split(" ")[0] for cell in lines[3].split("|")[3:6]]
    assert lines[3].startswith("| sums, 3 | foreign |") and cells == ["0.67", "0.33", "0.33"]


def test_options_have_the_limits_of_the_pipeline():
    options = parse(["pipelines/reason.yaml", "--policy", "grpo", "--data", "data"])
    assert (options.max_tokens, options.thinking_budget, options.prompts) == (80, 64, 100)
