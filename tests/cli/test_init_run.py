"""``align init sft --model NAME --data FILE --hardware CARD``: the file fits rows, model and card, and is planned."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from align.cli.init_run import choose_verifier, measure_lengths
from align.cli.main import main
from align.config.stages.inputs import ModelConfig
from align.models.compute.model_types import architecture_of
from tests.support.capacity.released import RELEASED, write_hub_cache

QWEN = "Qwen/Qwen3-4B-Instruct-2507"
ROWS = 40


def write_rows(file: Path, make: Callable[[int], dict[str, Any]], count: int = ROWS) -> None:
    file.write_text("".join(json.dumps(make(number)) + "\n" for number in range(count)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file for each kind, and a Hub's cache without tokenizers."""
    write_hub_cache(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("ALIGN_STORE", str(tmp_path / "store"))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    # 5,970 bytes are 1,990 tokens in an estimate, which with two turns are 2,006.
    write_rows(home / "my.jsonl", lambda n: {"question": f"{n:0>20}", "reply": "a" * 5950})
    votes = {"vote": "first", "first": "b" * 3000, "second": "c" * 2900}
    write_rows(home / "pairs.jsonl", lambda n: {"prompt": f"Say {n}.", **votes})
    write_rows(home / "problems.jsonl", lambda n: {"problem": f"{n:0>1440}", "answer": str(n + 7)})
    return home


FILES = {"sft": "my.jsonl", "dpo": "pairs.jsonl", "grpo": "problems.jsonl --answer answer"}


def init(kind: str, model: str, hardware: str, data: str | None = None) -> int:
    words = f"init {kind} --model {model} --data {data or FILES[kind]} --hardware {hardware} --output out"
    return main(shlex.split(words))


def written(kind: str) -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load(Path("out", f"{kind}.yaml").read_text())["stages"]
    return stages


@pytest.mark.parametrize("name", RELEASED)
def test_values_of_configs_give_the_published_sizes(name: str) -> None:
    assert architecture_of(RELEASED[name].config).parameters == RELEASED[name].parameters


CASES = [
    ("sft", QWEN, "24gb", "lora"),
    ("sft", "Qwen/Qwen3-8B", "24gb", "lora"),
    ("sft", "Qwen/Qwen3-14B", "24gb", "qlora"),
    ("dpo", "meta-llama/Llama-3.1-8B-Instruct", "80gb", "lora"),
    ("grpo", "meta-llama/Llama-3.2-3B-Instruct", "24gb", "lora"),
    ("sft", "meta-llama/Llama-3.2-1B-Instruct", "80gb", "full"),
    ("grpo", "google/gemma-3-1b-it", "16gb", "lora"),
    ("sft", "google/gemma-3-4b-it", "24gb", "lora"),
    ("dpo", "mistralai/Mistral-7B-Instruct-v0.3", "24gb", "lora"),
    ("grpo", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "24gb", "lora"),
    ("dpo", "HuggingFaceTB/SmolLM3-3B", "16gb", "lora"),
    ("grpo", "microsoft/Phi-4-mini-instruct", "24gb", "lora"),
]


@pytest.mark.parametrize(("kind", "model", "hardware", "tuning"), CASES, ids=[case[1] for case in CASES])
def test_each_file_is_planned(
    kind: str, model: str, hardware: str, tuning: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(kind, model, hardware) == 0, capsys.readouterr().err
    stages = written(kind)
    assert stages["model"]["revision"] == RELEASED[model].commit
    assert stages[kind]["tuning"]["method"] == tuning and stages[kind]["learning_rate"] > 0
    if "evaluate" in stages:
        assert stages["evaluate"]["gates"] and stages["report"]["scorecard"] == "evaluate"
    else:
        assert model == "Qwen/Qwen3-14B" and stages["report"] == {"stages": ["model", "data", kind]}
    text = Path("out", f"{kind}.yaml").read_text()
    assert "# No card has run this file." in text and "$" not in text.partition("\n")[2]
    capsys.readouterr()
    assert main(["plan", f"out/{kind}.yaml", "--json"]) == 0
    assert {step["action"] for step in json.loads(capsys.readouterr().out)} == {"run"}
    assert_plan_is_said(Path("out", f"{kind}.yaml"), hardware, capsys)


def assert_plan_is_said(file: Path, hardware: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Compare the comments in a file's head with the plan's line of each stage."""
    assert main(["plan", str(file), "--hardware", hardware]) == 0, capsys.readouterr().err
    planned = re.findall(r"^(\w+): .*\n  (fits: .*)$", capsys.readouterr().out, re.MULTILINE)
    comments = [line for line in file.read_text().splitlines() if line.startswith("# By `align plan`")]
    assert comments == [f"# By `align plan`, {stage} {fit}" for stage, fit in planned] and comments


CARDS = sorted(Path("pipelines/cards").absolute().glob("*.yaml"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_are_planned(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(CARDS) == 6 and "# No card has run this file." in path.read_text()
    assert main(["plan", str(path)]) == 0
    capsys.readouterr()
    assert_plan_is_said(path, path.stem.rpartition("_")[2], capsys)


def test_twelve_models_are_of_six_families() -> None:
    assert {case[1] for case in CASES} == RELEASED.keys() and len(RELEASED) == 12
    assert len({architecture_of(model.config).model_type for model in RELEASED.values()}) >= 5


def test_lengths_set_the_limits(folder: Path) -> None:
    assert init("sft", QWEN, "24gb") == 0
    assert init("grpo", QWEN, "80gb") == 0
    assert init("dpo", QWEN, "80gb") == 0
    # 20 + 5,950 bytes and two turns are 2,006 tokens; the next multiple of 64 is 2,048.
    assert written("sft")["sft"]["max_length"] == 2048
    # 1,440 bytes and a turn are 488 tokens.
    assert written("grpo")["grpo"]["max_prompt_tokens"] == 512
    assert written("grpo")["grpo"]["score"] == written("grpo")["evaluate"]["score"] == [{"number": "answer"}]
    assert written("grpo")["data"]["keep"] == ["answer"]
    # 6 or 7 + 3,000 bytes and two turns are 1,019 tokens.
    assert written("dpo")["dpo"]["max_length"] == 1024


def test_percentiles_are_of_tokens_by_hand() -> None:
    rows = [{"prompt": [{"role": "user", "content": "a" * 3 * n}], "completion": []} for n in range(1, 101)]
    lengths, text = measure_lengths(rows, ModelConfig(source="smollm2-135m-instruct"))
    # Row n has n tokens and 8 of its turn.
    assert lengths["row"] == {95: 95 + 8, 99: 99 + 8} and lengths["answer"] == {95: 0, 99: 0}
    assert "95 % have at most 103, 99 % at most 107, estimated by 3 bytes a token" in text


def test_tokens_are_counted_by_the_tokenizer_of_a_folder(tiny_model: Path) -> None:
    from align.models.pretrained import open_tokenizer

    messages = [{"role": "user", "content": "Say it. ü"}, {"role": "assistant", "content": "It."}]
    rows = [{"prompt": messages[:1], "completion": messages[1:]}] * 20
    lengths, text = measure_lengths(rows, ModelConfig(source=str(tiny_model)))
    tokenizer = open_tokenizer(tiny_model)
    expected = [len(tokenizer.apply_chat_template(messages[:count])["input_ids"]) for count in (1, 2)]
    assert (lengths["prompt"][95], lengths["row"][99]) == tuple(expected)
    assert lengths["answer"][99] == expected[1] - expected[0] and "by the model's tokenizer" in text


def test_95th_percentile_limits_rows_if_the_99th_does_not_fit(folder: Path) -> None:
    # Two rows of forty are longer than any that fits, so they are above the 95th percentile.
    write_rows(folder / "long.jsonl", lambda n: {"prompt": "a", "completion": "b" * (600_000 if n < 2 else 3000)})
    assert init("sft", "Qwen/Qwen3-8B", "24gb", "long.jsonl") == 0
    assert written("sft")["sft"]["max_length"] == 1024
    assert "95 % of the rows are at most that long" in Path("out/sft.yaml").read_text()


@pytest.mark.parametrize(
    ("make", "verifier"),
    [
        (lambda n: str(n), "number"),
        (lambda n: "ABCD"[n % 4], "choice"),
        (lambda n: rf"\frac{{x^{n + 2}}}{{3}}", "math"),
        (lambda n: f"town of letter {'abcdefgh'[n % 8]}", "exact"),
    ],
)
def test_verifier_follows_from_the_answers(make: Callable[[int], str], verifier: str) -> None:
    rows = [
        {"id": str(n), "prompt": [{"role": "user", "content": f"Problem {n}?"}], "right": make(n)} for n in range(ROWS)
    ]
    assert choose_verifier(rows, argparse.Namespace(answer="right")) == verifier


def test_mapping_of_votes_is_written(folder: Path) -> None:
    assert init("dpo", QWEN, "80gb") == 0
    data = written("dpo")["data"]
    assert data["dataset"] == "../pairs.jsonl"
    assert data["better"] == {"label": "vote", "a": "first", "b": "second"}


def test_template_and_thoughts_are_set(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert init("sft", "Qwen/Qwen3-8B", "24gb") == 0
    assert written("sft")["model"]["thinking"] == "off"
    Path("out/sft.yaml").unlink()
    write_rows(folder / "thoughts.jsonl", lambda n: {"prompt": f"{n}?", "completion": f"<think>\nHm.\n</think>\n\n{n}"})
    assert init("sft", "Qwen/Qwen3-8B", "24gb", "thoughts.jsonl") == 0
    assert written("sft")["model"]["thinking"] == "on"
    assert init("dpo", QWEN, "24gb") == 0 and "thinking" not in written("dpo")["model"]
    write_hub_cache(tmp_path / "bare", has_template=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "bare"))
    assert init("grpo", "meta-llama/Llama-3.2-1B-Instruct", "24gb") == 0
    # Without a vocabulary, a template of plain text.
    assert written("grpo")["model"]["chat_template"] == "zephyr"
    assert main(["plan", "out/grpo.yaml"]) == 0
    Path("out/grpo.yaml").unlink()
    words = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<|eot_id|>"))
    tokenizer.add_special_tokens(words)
    tokenizer.save(str(next((tmp_path / "bare").glob("*Llama-3.2-1B*/snapshots/*")) / "tokenizer.json"))
    assert init("grpo", "meta-llama/Llama-3.2-1B-Instruct", "24gb") == 0
    assert written("grpo")["model"]["chat_template"] == "llama3"


GOOD = f"--model {QWEN} --data my.jsonl --hardware 24gb"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"ppo {GOOD}", "are for sft, dpo, grpo"),
        (f"sff {GOOD}", "Did you mean 'sft'?"),
        (f"sft --model {QWEN}", "--data and --hardware missing, as in `align init sft --model"),
        ("sft --hardware 24gb", "--model and --data missing"),
        (f"sft {GOOD} --answer reply", "--answer is for grpo"),
        (f"sft {GOOD} --hardware 24gib", "Did you mean '24gb'?"),
        (f"sft {GOOD} --hardware 8xh100", "writes files for one device"),
        (f"sft {GOOD} --model Qwen/Qwen3-4C", "is not in the Hub's cache, and --offline"),
        (f"sft {GOOD} --model {QWEN}@{'0' * 40}", "the config.json of"),
        (f"sft {GOOD} --model none/such/folder", "nor a Hub name"),
        (f"sft {GOOD} --data mine.jsonl", "mine.jsonl"),
        (f"sft {GOOD} --data empty.jsonl", "no records"),
        (f"sft {GOOD} --data pairs.jsonl", "`align init dpo` learns from them."),
        (f"dpo {GOOD}", "the columns are question, reply. These are prompts with an answer, and dpo needs"),
        (f"sft {GOOD} --data odd.jsonl", "the columns are x, y, and sft needs prompts with an answer"),
        (f"sft {GOOD} --data few.jsonl", "has 5 rows. Some are held out, so give at least 20."),
        (f"sft {GOOD} --data broken.jsonl", "broken.jsonl:40"),
        (f"grpo {GOOD}", "the columns are question, reply. Name the column with the right answer: --answer COLUMN."),
        (f"grpo {GOOD} --answer repl", "Did you mean 'reply'?"),
        (f"grpo {GOOD} --answer reply", "not all rows have a number, a letter, an expression or a short text there"),
    ],
)
def test_bad_input_is_refused(words: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder / "odd.jsonl", lambda n: {"x": n, "y": n})
    write_rows(folder / "few.jsonl", lambda n: {"prompt": f"{n}", "completion": "b"}, 5)
    write_rows(folder / "broken.jsonl", lambda n: {"prompt": f"{n}", "completion": "b"}, 39)
    with (folder / "broken.jsonl").open("a") as stream:
        stream.write("{\n")
    (folder / "empty.jsonl").touch()
    assert main(["init", *shlex.split(words), "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not Path("out").exists()


def test_what_does_not_fit_names_a_card_that_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init("grpo", "Qwen/Qwen3-14B", "16gb") == 2
    error = capsys.readouterr().err
    assert "grpo fits on rtx4080 with none of the settings" in error and "method: qlora" in error
    card = error.partition("Take --hardware ")[2].partition(",")[0]
    assert init("grpo", "Qwen/Qwen3-14B", card) == 0


def test_no_file_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/sft.yaml").write_text("mine")
    assert init("sft", QWEN, "24gb") == 2
    assert "out/sft.yaml is there already" in capsys.readouterr().err
    assert Path("out/sft.yaml").read_text() == "mine" and len(list(Path("out").iterdir())) == 1


@pytest.mark.usefixtures("stages_in_process")
def test_written_file_runs_on_a_small_model(tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder / "small.jsonl", lambda n: {"prompt": f"Say {n}.", "completion": f"{n}"})
    options = ["--model", str(tiny_model), "--data", "small.jsonl", "--hardware", "cpu", "--output", "out", "--json"]
    assert main(["init", "sft", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "align run out/sft.yaml" and document["plan"].startswith("By `align plan`")
    sets = ["stages.sft.max_steps=1", "stages.sft.batch_size=2", "runtime.engine.name=transformers",
            "stages.evaluate.max_tokens=4", "stages.evaluate.max_prompts=2", "stages.evaluate.gates={}"]  # fmt: skip
    assert main(["run", "out/sft.yaml", *(word for text in sets for word in ("--set", text)), "--json"]) == 0
