"""The text after thoughts, and the final numbers of worked solutions."""

from __future__ import annotations

import json
import re
import time
from decimal import Decimal
from pathlib import Path

import pytest

from align.data.checkers import gsm8k_answer
from align.data.final_answers import EMPTY, final_number, hide_thoughts, last_number, split_thought
from tests.support.evaluation.tasks.respondents import NoModelContext, answered, make_gsm8k_task


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("Yes.", ""),
        ("<think>a</think>Yes.", "<think>a</think>"),
        ("\n<thought>a</thought> <think>b</think>Yes.", "\n<thought>a</thought> <think>b</think>"),
        ("<reasoning>a</think>Yes.", "<reasoning>a</think>Yes."),  # another tag closes nothing
        ("a</thinking> Yes.", "a</thinking>"),
        ("[THINK]a[/THINK]Yes.", "[THINK]a[/THINK]"),
        ("a[/THINK] Yes.", "a[/THINK]"),
        ("<|channel|>analysis<|message|>a<|end|>Yes.", "<|channel|>analysis<|message|>a<|end|>"),
        ("<|channel|>commentary to=f<|message|>{}", ""),
        ("Yes <think>a</think>", ""),  # only what a turn begins with
        ('{"x": "</think>"}', ""),  # text of a call
    ],
)
def test_leading_thoughts_become_spaces(text: str, thought: str) -> None:
    assert hide_thoughts(text) == " " * len(thought) + text.removeprefix(thought)


def test_empty_thoughts_are_recognized() -> None:
    texts = ("<think></think>", "</reasoning>", "[THINK][/THINK]", "<think>a</think>", "<think>")
    assert [bool(EMPTY.fullmatch(text)) for text in texts] == [True, True, True, False, False]


TEXTS = {
    "He has 3 cats.\n#### 1,200": "1200",
    "#### 72\n\nQuestion: what is 3 + 1?\nAnswer: 4": "72",
    "#### $1,080.00 in all, 3 of them": "1080",
    "####\n9": "9",
    "5 apples\n####": "5",
    "so it costs $12.50.": "12.5",
    "-4": "-4",
    "−4": "-4",
    "10-3": "3",
    "18 dollars": "18",
    "18 km/h": "18",
    "18%": "18",
    "it is 18.": "18",
    "it is 18.00...": "18",
    "that is 18. $.": "18",
    "$\\boxed{72}$ is right, and not 7 or 8": "72",
    "\\boxed{\\$1{,}080}": "1080",
    "\\boxed{72 \\text{ apples}}, of 80": "72",
    "first \\boxed{4}, then \\boxed{x = 4}. 5": "4",
    "\\boxed{many} of 6": "6",
    "\\boxed{4}\n#### 4": "4",
    "**4**": "4",
    "–4": "-4",
    "1,08,000": "108000",
    "1.5 million": "1500000",
    "1.5 \\times 10^{-2}": "0.015",
    "3½": "3.5",
    "not 3 but 4": "4",
    "That is 4 more than Ann cut in 4 minutes": "4",
    "The answer is **18**.": "18",
    "so she makes **$18** per day.": "18",
    "So __18__ it is, not ~~17~~.": "18",
    "it is _18_ and no **more**": "18",
    "**Final Answer:** `18`": "18",
    "**Answer:**\n\n***18***": "18",
    "<b>18</b> apples\u200b": "18",
    "\\textbf{18} and \\boxed{\\mathbf{18}}": "18",
    "the answer is **18 (eighteen)**": "18",
    "$18K": "18000",
    "$1.5M": "1500000",
    "#### 16 + 2 = 18": "18",
    "Week 3:210 pages": "210",
    "2**3": None,
    "2 ** 3 = **8**": "8",
    "3 × **6**": None,
    "**18** or **19**": None,
    "**18**\n**19**": None,
    "at 10:30": None,
    "\\boxed{5": None,  # cut within the answer
    "<think>maybe #### 18</think> #### 16": "16",
    "<thinking>4 or 5</thinking><reasoning>6</reasoning>\\boxed{7}": "7",
    "It may be 18.</think>\n\nIt is 16.": "16",
    "analysisPerhaps 18.assistantfinalIt is 16.": "16",
    "<|channel|>analysis<|message|>#### 18<|end|><|start|>assistant<|channel|>final<|message|>16<|return|>": "16",
    "\\boxed{\\frac{7}{2}}": "3.5",
    "$\\boxed{-\\dfrac72}$": "-3.5",
    "\\boxed{3\\frac{1}{2} \\text{ cups}}": "3.5",
    "#### 7/2": "3.5",
    "3 1/2 cups": "3.5",
    "on 3/4/2024 it was 8": "8",
    "4 or 4.0": "4",
    "between 4 and 5, so 4.5": "4.5",
    "#### 18 (2 times 9)": "18",
    "$30 + $160 = $190": "190",
    "": None,
    "nothing": None,
    "<think>It is 16.": None,
    "#### 16 <think>or not": None,
    "<|channel|>analysis<|message|>It is 16": None,
    "analysisIt is 16": None,
    "16</think>": None,
    "4,5": None,
    "4 or 5": None,
    "4 eggs or maybe 5": None,
    "It is 4 and 5.": None,
    "\\boxed{4, 5}": None,
    "\\boxed{x = 4 \\text{ or } x = 5}": None,
    "\\boxed{\\pm 4}": None,
    "$\\boxed{4}$ or $\\boxed{5}$": None,
    "\\boxed{\\frac{x}{2}}": None,
    "#### 18 19 20 21": None,
    "#### 18 eggs, 19 eggs": None,
    "#### 5\nno, #### 6 and 7": None,
    "#### 4 or 5\nIt is 4.": None,
    "7/0": None,
    "first \\boxed{3}, then \\boxed{x = 4}.": None,
    "\\boxed{3}\n#### 4": None,
    "3\n4": None,
    "3-4": None,
    "3? 4?": None,
    "6 * 4": None,
    "2^4": None,
    "\\sqrt{4}": None,
    "not 4": None,
    "at least 4": None,
    "more than about 4": None,
    "3, otherwise 4": None,
    "0x4": None,
    "I do not know. It has 4 pages.": None,
    "<!-- 4 -->": None,
}


@pytest.mark.parametrize(("text", "number"), TEXTS.items())
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_reward_and_evaluation_give_every_text_the_same_verdict(tmp_path: Path) -> None:
    problems = [(text, number) for text, number in TEXTS.items() if number is not None]
    records = [
        {"question": f"Which, number {index}?", "answer": f"so\n#### {number}"}
        for index, (_, number) in enumerate(problems)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [{"id": str(index), "checks": json.dumps({"answer": number})} for index, (_, number) in enumerate(problems)]
    task = make_gsm8k_task(tmp_path, files=["asked.jsonl"])
    for shift in (0, 12):  # the right answers, and others'
        texts = [problems[(index + shift) % len(problems)][0] for index in range(len(problems))]
        scores = gsm8k_answer(rows, texts)
        measured = task.score({"a": answered(task, [[text] for text in texts])}, NoModelContext())["a"]
        assert [samples[0] for samples in measured.values[task.primary]] == scores
        assert sum(scores) == len(scores) if shift == 0 else sum(scores) < len(scores) / 2


def test_long_answers_take_linear_time() -> None:
    started = time.process_time()
    for piece in (
        "\\boxed{",
        "\\boxed{1}",
        "\\boxed {a{",
        "{}",
        "\\boxed{{1}",
        "\\frac1",
        "1 1/",
        "1 or ",
        "<think>",
        "1,",
        "**1** ",
        "_1_ ",
        "`1",
        "1:",
    ):
        final_number(piece * 100_000)
    assert time.process_time() - started < 5


def test_real_solutions_keep_their_number(shared_data: Path) -> None:
    lines = (shared_data / "gsm8k/train.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    golds = [Decimal(answer.rpartition("####")[2].strip().replace(",", "")) for answer in answers]
    assert [final_number(answer) for answer in answers] == golds
    # Without the mark, only sentences such as "10x or 190" lose the number that is last.
    plain = [re.sub(r"<<[^<>]*>>", "", answer.rpartition("####")[0]) for answer in answers]
    lost = [
        (gold, final_number(text))
        for text, gold in zip(plain, golds, strict=True)
        if last_number(text) == gold and final_number(text) != gold
    ]
    assert len([number for _, number in lost if number is None]) == 5
    # "$4 million" is 4,000,000; GSM8K's mark repeats the 4.
    others = [number / gold for gold, number in lost if number is not None]
    assert sorted(others) == [1_000, 10**6, 10**6, 10**6, 10**9]


@pytest.mark.parametrize(
    ("text", "is_opened", "thought", "answer", "is_open"),
    [
        ("Yes.", False, "", "Yes.", False),
        (" Yes.", False, "", " Yes.", False),
        ("<think>a</think>\n\nYes.", False, "<think>a</think>\n\n", "Yes.", False),
        ("<think>a", False, "<think>a", "", True),
        ("a</think>Yes.", True, "a</think>", "Yes.", False),
        ("a", True, "a", "", True),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Yes.", False,
         "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>", "Yes.", False),
    ],
)  # fmt: skip
def test_thought_is_split_from_the_answer(text: str, is_opened: bool, thought: str, answer: str, is_open: bool) -> None:
    split = split_thought(text, is_opened)
    assert (str(split), split.thought, split.is_open, split.full_text) == (answer, thought, is_open, text)
