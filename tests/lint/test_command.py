"""What ``align data lint`` calls: rows or a built folder, for a model's tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.config.stages.lint import RULES
from align.data.rows import assistant, user
from align.lint.findings import Example, Finding, Findings, Place, format_findings, has_errors
from align.lint.linter import Options
from align.lint.trainer import lint_dataset, load_tokenizer_and_limits
from tests.support.chat_templates import THINKING
from tests.support.lint.harness import dataset, instructions, look, pairs
from tests.support.refusals import Refused

DOCS = Path(__file__).parents[2] / "docs" / "lint.md"


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_folder_in_shards(tiny_model: Path, tmp_path: Path) -> None:
    rows = instructions(20)
    rows[12]["prompt"] = [user("half a sentence \ufffd")]
    rows[18]["prompt"] = rows[1]["prompt"]
    by_name = named(lint_dataset(dataset(tmp_path, rows[:16], rows[16:]), str(tiny_model), max_length=512))
    assert by_name.keys() == {"not-utf8", "leaked-prompt"}
    assert [f.examples[0].place for f in by_name.values()] == [Place("train", 13, "row-12"), Place("test", 3, "row-18")]
    assert by_name["leaked-prompt"].of == 20


def test_the_kind_is_found_or_given(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    rows = pairs(10)
    rows[2]["rejected"] = [assistant("never mind " * 40)]  # 440 tokens: more than a byte tokenizer should see
    folder = dataset(tmp_path, rows[:8], rows[8:])
    assert set(named(lint_dataset(folder, str(tiny_model), max_length=400))) == {"over-max-length"}
    assert set(named(lint_dataset(folder, str(tiny_model), "reward", max_length=400))) == {"over-max-length"}
    assert not lint_dataset(folder, str(tiny_model), "sft", max_length=400)
    assert not lint_dataset(folder, str(tiny_model), "ppo", max_length=400)
    refused(lambda: lint_dataset(folder, str(tiny_model), "grop"))
    # KTO makes two labeled answers of a pair.
    assert set(named(lint_dataset(folder, str(tiny_model), "kto", max_length=400))) == {"over-max-length"}
    refused(lambda: lint_dataset(folder, str(tiny_model), "pretrain"))


@pytest.mark.parametrize(
    "kind",
    [
        "dpo",
        "preferences",
        "kto",
        "unpaired",
    ],
)
def test_a_kind_whose_fields_the_rows_lack_is_refused(refused: Refused, tmp_path: Path, kind: str) -> None:
    rows = instructions(10)
    refused(lambda: lint_dataset(dataset(tmp_path, rows[:8], rows[8:]), "no model is opened", kind))


def test_labeled_answers_are_read_as_kto_reads_them(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": number % 2 == 0} for number, row in enumerate(instructions(10))]
    rows[3]["completion"] = [assistant("never mind " * 40)]
    folder = dataset(tmp_path, rows[:8], rows[8:])
    # SFT would cut the long answer; KTO leaves it out.
    for kind in (None, "unpaired", "kto"):
        (finding,) = lint_dataset(folder, str(tiny_model), kind, max_length=400)
        assert (finding.name, finding.examples[0].place.row) == ("over-max-length", 4)


def test_only_a_sample_of_many_rows(tiny_model: Path, tmp_path: Path) -> None:
    folder = dataset(tmp_path, instructions(20), instructions(30)[20:])
    by_name = named(lint_dataset(folder, str(tiny_model), max_length=8))
    some = named(lint_dataset(folder, str(tiny_model), max_length=8, rows=5))
    assert [by_name["no-room-for-answer"].count, some["no-room-for-answer"].count] == [30, 10]
    assert [finding.of for finding in (*by_name.values(), *some.values())] == [30, 10]


def test_rows_at_hand(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer, limits, ends = load_tokenizer_and_limits(str(tiny_model), tmp_path, None)
    assert (limits.context, limits.embeddings, ends) == (2048, 260, {2})
    assert not look(tokenizer, instructions(), options=Options("instructions"))
    labeled = [{**row, "label": number % 2 == 0} for number, row in enumerate(instructions(60))]
    assert not look(tokenizer, labeled, options=Options("unpaired"))


def test_faulty_tokenizer_is_linted_and_not_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|im_end|>"}))
    data = tmp_path / "data"
    data.mkdir()
    dataset(data, instructions(4), instructions(6)[4:])
    assert set(named(lint_dataset(data, str(folder)))) == {"pad-is-eos"}


def test_what_is_missing_is_named(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    refused(lambda: lint_dataset(tmp_path, str(tiny_model)))
    dataset(tmp_path, instructions(4), instructions(6)[4:])
    refused(lint_dataset, tmp_path, "smollm2-135m-instrct")


def test_findings_are_printed_without_steering_the_terminal() -> None:
    findings = Findings(looked_at=7)
    findings.add("double-bos", Place("train", 3, "id\x1b[2J"), "text \x1b]0;title\x07 \u202e\ud83d é 你好")
    assert has_errors(findings.result())
    text = format_findings(findings.result())
    assert "error double-bos, 1 of 7 rows:" in text
    assert "train row 3 (id\\x1b[2J): text \\x1b]0;title\\x07 \\u202e\\ud83d é 你好" in text
    assert text.endswith("1 error, 0 warnings, 0 notes")
    assert not has_errors([])
    assert format_findings([]) == "0 errors, 0 warnings, 0 notes"


def test_a_row_counts_once_and_five_are_shown() -> None:
    findings = Findings()
    for row in range(9):
        for _ in range(2):
            findings.add("placeholder", Place("train", row + 1), "x" * 500)
    (actual,) = findings.result()
    assert actual.count == 9
    assert len(actual.examples) == 5
    assert actual.examples[4] == Example(Place("train", 5), "x" * 159 + "…")


def test_the_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = instructions(10)
    folder = dataset(tmp_path, rows[:8], rows[8:])
    assert main(["data", "lint", str(folder), "--model", str(tiny_model)]) == 0
    rows[3]["completion"] = [assistant("")]
    dataset(tmp_path, rows[:8], rows[8:])
    assert main(["data", "lint", str(folder), "--model", str(tiny_model), "--json"]) == 1
    (actual,) = json.loads(capsys.readouterr().out.partition("notes\n")[2])
    assert [actual["name"], actual["severity"], actual["count"]] == ["empty-answer", "error", 1]


def test_the_documentation_lists_every_rule_as_it_is() -> None:
    entry = re.compile(r"\*\*`([\w-]+)`\*\* \((\w+)\): (.+)\. Fix: (.+)")
    bullets = re.split(r"^(?:- |#)", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    matches = [entry.fullmatch(" ".join(bullet.split())) for bullet in bullets]
    listed = {match[1]: [match[2], match[3], match[4]] for match in matches if match}
    wanted: dict[str, Any] = {name: [rule.severity, rule.what, rule.remedy] for name, rule in RULES.items()}
    assert listed == wanted


def test_thinking_switch_is_linted(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "thinker"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    rows = instructions(20)
    rows[2]["completion"] = [assistant("<think>\nI count.\n</think>\n\nThere are nine kinds.")]
    folder = dataset(tmp_path, rows[:16], rows[16:])
    on, off = (named(lint_dataset(folder, str(model), max_length=512, thinking=state)) for state in ("on", "off"))
    assert "unexpected-thought" not in on
    assert off["unexpected-thought"].count == 1
    refused(lambda: lint_dataset(folder, str(tiny_model), thinking="off"))
