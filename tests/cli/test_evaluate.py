"""``align eval`` as a user types it: what words mean, which base model is added, and one evaluation for real."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from align import Pipeline
from align.cli.checkpoints import base_of, find_all
from align.cli.evaluate import with_bases
from align.cli.main import main
from align.cli.suite import ComparedCheckpoints, choose_reference, load_suite, suite_pipeline
from align.config.stages.evaluate import EvaluateConfig
from align.config.validation import validate
from align.evaluation.scorecard import PROMPT_SET_METRICS, prompt_set_metric
from align.models.built_in import make_tiny
from align.store.artifacts import Artifact, Kind
from align.store.store import Store
from tests.support.records import record_of
from tests.support.refusals import Refused

pytestmark = pytest.mark.usefixtures("stages_in_process")
Capture = pytest.CaptureFixture[str]
QUESTIONS = [
    {"key": 1, "prompt": "Say x without a comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 2, "prompt": "Say y in capitals.", "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]},
]
SUITE: dict[str, Any] = {
    "description": "Two instructions.",
    "seed": 5,
    "runtime": {"engine": {"name": "transformers"}, "device": "cpu"},
    "precision": "float32",
    "bootstrap": 200,
    "max_tokens": 8,
    "tasks": {"ifeval": {"files": ["{folder}/ifeval.jsonl"], "max_tokens": 8}},
    "baselines": {"prompted": {"of": "base", "system": "Be brief."}},
}


def pipeline_of(folder: Path, tiny_model: Path, tiny_reward: Path, name: str = "chain") -> dict[str, Any]:
    """A model, two checkpoints from it, a reward model from the first, prompts, and the suite's own evaluation."""
    block = {key: value for key, value in suite_of(folder).items() if key not in ("description", "seed", "runtime")}
    block["baselines"] = {"prompted": {"of": "model", "system": "Be brief."}}
    stages = {
        "model": {"stage": "tests.support.cli.copying_stages:MODEL", "folder": str(tiny_model)},
        "sft": {"stage": "tests.support.cli.copying_stages:POLICY", "model": "model", "folder": str(folder / "sft")},
        "ppo": {"stage": "tests.support.cli.copying_stages:POLICY", "model": "sft", "folder": str(folder / "ppo")},
        "reward": {"stage": "tests.support.cli.copying_stages:REWARD", "model": "sft", "folder": str(tiny_reward)},
        "prompts": {"stage": "tests.support.stages.fixed_inputs:PROMPTS", "count": 8},
        "evaluate": {
            "policies": ["model", "sft", "ppo"], "reference": "sft", "prompts": "prompts", "reward": "reward", **block,
        },
    }  # fmt: skip
    return {"name": name, "seed": SUITE["seed"], "runtime": SUITE["runtime"], "stages": stages}


def suite_of(folder: Path) -> dict[str, Any]:
    evaluated: dict[str, Any] = json.loads(json.dumps(SUITE).replace("{folder}", str(folder)))
    return evaluated


@pytest.fixture(scope="module")
def chain(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_reward: Path, stages_in_process: None
) -> SimpleNamespace:
    """A finished pipeline with everything that can be evaluated in its store, and a suite."""
    folder = tmp_path_factory.mktemp("chain")
    make_tiny(folder / "sft", seed=1)
    make_tiny(folder / "ppo", seed=2)
    (folder / "ifeval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite_of(folder), sort_keys=False))
    file = folder / "chain.yaml"
    file.write_text(yaml.safe_dump(pipeline_of(folder, tiny_model, tiny_reward), sort_keys=False))
    run = Pipeline.load(file).run(store=folder / "store")
    return SimpleNamespace(
        folder=folder, file=str(file), suite=str(folder / "suite.yaml"), store=str(folder / "store"),
        artifacts=run.artifacts, plain=str(tiny_model),
    )  # fmt: skip


def key_of(chain: SimpleNamespace, stage: str) -> str:
    return str(chain.artifacts[stage].record["key"])


# --- what words mean --------------------------------------------------------------------------------------------------


def test_every_way_to_say_a_checkpoint(chain: SimpleNamespace) -> None:
    artifact = chain.artifacts["sft"]
    for word in (
        f"{chain.file}:sft", key_of(chain, "sft")[:10], f"policy/{key_of(chain, 'sft')[:10]}", str(artifact.path),
        str(artifact.path / "model"),
    ):  # fmt: skip
        (evaluated,) = find_all([word], chain.store)
        assert (evaluated.name, evaluated.stage["stage"]) == ("sft", "artifact"), word
        assert Path(evaluated.stage["path"]).resolve() == artifact.path.resolve()
        assert not evaluated.is_plain
    commit = "0123456789abcdef0123456789abcdef01234567"
    plain_models = find_all([chain.plain, "tiny", f"some-org/My.Model-1b@{commit}"], chain.store)
    assert [checkpoint.stage for checkpoint in plain_models] == [
        {"stage": "model", "source": chain.plain},
        {"stage": "model", "source": "tiny"},
        {"stage": "model", "source": "some-org/My.Model-1b", "revision": commit},
    ]
    assert plain_models[0].name == Path(chain.plain).parent.name  # its folder is called `model`, as all are
    assert [checkpoint.name for checkpoint in plain_models][1:] == ["tiny", "My-Model-1b"]


def test_names_are_made_unique_and_may_be_given(refused: Refused, chain: SimpleNamespace) -> None:
    sft = f"{chain.file}:sft"
    assert [checkpoint.name for checkpoint in find_all([sft, sft, f"mine={sft}", "tiny"], chain.store)] == [
        "sft", "sft-2", "mine", "tiny",
    ]  # fmt: skip
    # a name that was given is kept, whatever the others are called
    assert [checkpoint.name for checkpoint in find_all([sft, f"sft={chain.file}:ppo"], chain.store)] == ["sft-2", "sft"]
    refused(find_all, [f"a={sft}", f"a={chain.file}:ppo"], chain.store)


# --- the base model ---------------------------------------------------------------------------------------------------


def bases(chain: SimpleNamespace, words: list[str], add_bases: bool = True) -> tuple[list[str], list[str]]:
    evaluated, names = with_bases(find_all(words, chain.store), Store(Path(chain.store)), add_bases)
    return [checkpoint.name for checkpoint in evaluated], names


def test_the_base_model_of_a_checkpoint_is_added_in_front(chain: SimpleNamespace, capsys: Capture) -> None:
    sft, ppo, model = (f"{chain.file}:{stage}" for stage in ("sft", "ppo", "model"))
    assert bases(chain, [sft, ppo]) == (["base", "sft", "ppo"], ["base"])
    assert bases(chain, [ppo, model]) == (["model", "ppo"], ["model"]), "given already, so not added"
    assert bases(chain, [ppo, f"start={model}"]) == (["start", "ppo"], ["start"])
    assert bases(chain, [f"base={ppo}"]) == (["base-2", "base"], ["base-2"])
    assert bases(chain, [ppo], add_bases=False) == (["ppo"], [])
    assert capsys.readouterr().err == ""
    assert bases(chain, [ppo, chain.plain])[1] == ["base"], "a record says more than an order"
    assert bases(chain, ["tiny", chain.plain])[1] == ["tiny"]
    assert "'tiny' counts as the base model" in capsys.readouterr().err


def test_the_base_of_a_reward_model_is_not_that_of_the_policy(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")

    def put(kind: str, makes: Kind, number: int, reads: tuple[Artifact, ...] = ()) -> Artifact:
        key = f"{number}" * 64
        output = tmp_path / key
        output.mkdir()
        links = [
            {"stage": source.stage, "kind": source.record["kind"], "key": source.record["key"]} for source in reads
        ]
        return store.publish(output, record_of(kind, str(number), makes, input_stages=links))

    (store.root / "model").mkdir()
    for folder in ("sft", "reward", "ppo"):
        (store.root / folder).mkdir()
    other_base, base = put("model", Kind.MODEL, 1), put("model", Kind.MODEL, 2)
    reward, sft = put("reward", Kind.REWARD, 3, (other_base,)), put("sft", Kind.POLICY, 4, (base,))
    assert base_of(put("ppo", Kind.POLICY, 5, (reward, sft)), store) == base


def test_the_base_is_found_in_the_store_of_the_checkpoint(chain: SimpleNamespace, tmp_path: Path) -> None:
    second_store = Store.open(tmp_path / "other")
    evaluated, names = with_bases(
        find_all([str(chain.artifacts["ppo"].path)], str(second_store.root)), second_store, True
    )
    assert [checkpoint.name for checkpoint in evaluated] == ["base", "ppo"] and names == ["base"]
    assert Path(evaluated[0].stage["path"]).resolve() == chain.artifacts["model"].path.resolve()


def test_a_base_that_is_gone_is_said(chain: SimpleNamespace, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(chain.store, tmp_path / "store")
    store = Store(tmp_path / "store")
    shutil.rmtree(store.folder("found", key_of(chain, "model")))
    evaluated, names = with_bases(find_all([key_of(chain, "ppo")], str(store.root)), store, True)
    assert ([checkpoint.name for checkpoint in evaluated], names) == (["ppo"], [])
    printed = capsys.readouterr().err
    assert printed.startswith("note: the base model of ppo is no longer in the store") and "--no-base" in printed


# --- a whole evaluation -----------------------------------------------------------------------------------------------


def evaluate(chain: SimpleNamespace, *words: str, checkpoints: tuple[str, ...] = ("sft", "ppo")) -> int:
    named = [f"{chain.file}:{stage}" for stage in checkpoints]
    return main(["eval", *named, "--suite", chain.suite, "--store", chain.store, *words])


def rows_of_table(text: str) -> dict[str, str]:
    """Lines of the printed table by what stands first in them."""
    return {line.split("  ")[0].strip(): line for line in text.splitlines() if line.strip()}


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their places."""
    if not isinstance(value, dict):
        return {place: value}
    return {name: leaf for key, item in value.items() for name, leaf in flat(item, f"{place}/{key}").items()}


def test_it_is_what_the_pipelines_own_stage_finds(chain: SimpleNamespace, tmp_path: Path, capsys: Capture) -> None:
    inputs = ["--prompts", key_of(chain, "prompts"), "--reward", f"{chain.file}:reward", "--reference", "sft"]
    out = tmp_path / "out"
    assert evaluate(chain, *inputs, "--output", str(out)) == 0
    captured = capsys.readouterr()
    card = json.loads((out / "scorecard.json").read_text())
    pipeline_card = json.loads((chain.artifacts["evaluate"].path / "scorecard.json").read_text())
    assert card["policies"] == ["base", "sft", "ppo", "prompted"] and card["base"] == "base"
    renamed = {"base": "model", "sft": "sft", "ppo": "ppo", "prompted": "prompted"}
    # Both read the same tokens in batches of their own, so numbers may differ by rounding.
    estimates = {renamed[name]: estimates for name, estimates in card["estimates"].items()}
    here, there = flat(estimates), flat(pipeline_card["estimates"])
    assert here.keys() == there.keys()
    for place, value in here.items():
        is_number = isinstance(value, float)
        assert value == (pytest.approx(there[place], rel=1e-4, abs=1e-6) if is_number else there[place]), place
    assert [system["key"] for system in card["systems"]] == [system["key"] for system in pipeline_card["systems"]]
    samples = [[json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
               for path in (out, chain.artifacts["evaluate"].path)]  # fmt: skip
    assert samples[0][0]["responses"]["ppo"][0]["text"] == samples[1][0]["responses"]["ppo"][0]["text"]
    assert (out / "items.jsonl").is_file()
    # what is printed
    page = re.findall(r"^Report: (.*)$", captured.out, re.MULTILINE)
    assert page == [str((out / "report.html").resolve())]
    assert "ppo" in Path(page[0]).read_text()
    rows = rows_of_table(captured.out)
    value = card["estimates"]["ppo"]["ifeval.prompt_strict"]["value"]
    title = card["metrics"]["ifeval.prompt_strict"]["title"]
    assert f"{value:.3f}" in rows[title] or f"{value:.2f}" in rows[title]
    assert rows["ifeval.prompt_strict"].count(" to ") == 4, "an interval below each number"
    assert any("base (base)" in line and "sft (reference)" in line for line in captured.out.splitlines())
    # once more: nothing runs, and no model is trained or copied again
    assert evaluate(chain, *inputs, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [name for name, stage in document["stages"].items() if stage["ran"]] == []
    assert document["name"] == "eval-suite" and Path(document["scorecard"]).is_file()
    runs = Store(Path(chain.store)).runs()
    assert set(runs) == {"chain", "eval-suite"}


def test_a_failed_gate_ends_with_1_and_everything_is_written(
    chain: SimpleNamespace, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--set", "gates={ifeval.prompt_strict: '>= 1.01', ifeval.prompt_loose: '>= 0'}", "--name", "gated",
             "--set", "tasks.ifeval.max_items=1", "--set", "runtime.threads=1"]  # fmt: skip
    code = evaluate(chain, *words, "--output", str(tmp_path / "out"), checkpoints=("ppo",))
    captured = capsys.readouterr()
    assert code == 1
    gates = [line for line in captured.err.splitlines() if line.startswith("gate failed: ")]
    assert len(gates) == 1 and "ifeval.prompt_strict of ppo" in gates[0] and "95 % interval" in gates[0]
    assert re.search(r"^✗ ifeval.prompt_strict of ppo", captured.out, re.MULTILINE)
    assert re.search(r"^✓ ifeval.prompt_loose of ppo", captured.out, re.MULTILINE)
    assert "ifeval.prompt_strict" in (tmp_path / "out" / "report.html").read_text()
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert card["tasks"]["ifeval"]["n"] == 1
    assert card["reference"] == "base", "one checkpoint has only its base to be compared with"
    assert [system["name"] for system in card["systems"]] == ["base", "ppo", "prompted"]


def test_baseline_of_missing_base_is_skipped(chain: SimpleNamespace) -> None:
    printed: list[str] = []

    def built(no_base: bool) -> Pipeline:
        evaluated, bases = with_bases(
            find_all([f"{chain.file}:ppo"], chain.store), Store(Path(chain.store)), not no_base
        )
        names = [checkpoint.name for checkpoint in evaluated]
        reference = choose_reference(None, names, bases)
        return suite_pipeline(
            load_suite(chain.suite), ComparedCheckpoints(evaluated, bases, reference), {}, None, printed.append
        )[0]

    block = built(no_base=False).nodes["evaluate"].config
    assert block.baselines["prompted"].of == "base" and printed == []  # type: ignore[attr-defined]
    assert built(no_base=True).nodes["evaluate"].config.baselines == {}  # type: ignore[attr-defined]
    assert printed == ["baseline 'prompted' is left out: it uses the base model, and this evaluation has none"]


def test_a_baseline_of_the_reference_has_its_name(chain: SimpleNamespace, tmp_path: Path) -> None:
    suite = suite_of(chain.folder)
    suite["baselines"] = {"again": {"of": "reference", "sample_seed": 1}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    evaluated = find_all([f"{chain.file}:sft", f"{chain.file}:ppo"], chain.store)
    pipeline, _ = suite_pipeline(
        load_suite(str(tmp_path / "s.yaml")), ComparedCheckpoints(evaluated, [], "ppo"), {}, None, print
    )
    config = pipeline.nodes["evaluate"].config
    assert config.baselines["again"].of == "ppo" and config.reference == "ppo"  # type: ignore[attr-defined]


# --- mistakes ---------------------------------------------------------------------------------------------------------

SFT = ["{file}:sft", "--suite", "{suite}"]
CASES: list[tuple[list[str], str]] = [
    (["{file}:sft"], "align eval: the following arguments are required: --suite."),
    (["{file}:sft", "--suite", "{dir}/suit.yaml"], "there is no such file. Did you mean {dir}/suite.yaml?"),
    (["{file}:sft", "--suite", "{file}"], "a pipeline, not a suite; `align run {file}` runs it."),
    (["{file}:sfd", "--suite", "{suite}"], "the pipeline has no stage 'sfd'; it has model, sft"),
    (["{file}:reward", "--suite", "{suite}"], "is a RewardCheckpoint, not a checkpoint that can answer."),
    (["tinny", "--suite", "{suite}"], "no artifact's key starts with 'tinny'; `align list` shows them. Did you mean"),
    (["org/name", "--suite", "{suite}"], "A model on the Hub is written with its revision: org/name@main."),
    (["org/name@main", "--suite", "{suite}"], "the Hub model 'org/name' at main is not in the Hub's cache"),
    (["{dir}", "--suite", "{suite}"], "not a checkpoint; it has no config.json."),
    (["a={file}:sft", "a={file}:ppo", "--suite", "{suite}"], "two checkpoints are called 'a'; give each its own name"),
    ([*SFT, "--reference", "stf"], "--reference stf: no checkpoint has this name. Did you mean 'sft'?"),
    ([*SFT, "--reward", "{file}:ppo"], "--reward {file}:ppo is a PolicyCheckpoint, not a RewardCheckpoint."),
    ([*SFT, "--reward", "{plain}"], "--reward {plain} is no reward model: "),
    ([*SFT, "--prompts", "{ppo}"], "is a PolicyCheckpoint, not rows."),
    ([*SFT, "--pairs", "{prompts}"], "is PromptData; it must be PreferenceData."),
    ([*SFT, "--output", "{suite}"], "is a file; name a folder."),
    ([*SFT, "--set", "bootstrp=3"], "--set bootstrp: unknown key 'bootstrp'. Did you mean 'bootstrap'?"),
    ([*SFT, "--set", "bootstrap"], "--set bootstrap: expected path=value, like tasks.ifeval.max_items=50."),
    ([*SFT, "--set", "bootstrap=3"], "{suite}: bootstrap: should be greater than or equal to 100; found 3."),
    ([*SFT, "--set", "bootstrap.x=3"], "--set bootstrap.x: 'bootstrap' is 200, not a block of keys."),
    (
        [*SFT, "--set", "policies=[a]"],
        "{suite}: policies belongs on the command line (CHECKPOINT...), not in a suite.",
    ),
    (
        [*SFT, "--set", "tasks.ifeval.max_itms=1"],
        "{suite}: tasks.ifeval: unknown key 'max_itms'. Did you mean 'max_items'?",
    ),
    ([*SFT, "--set", "tasks.ifeval.files=[nowhere.jsonl]"], "{suite}: tasks.ifeval"),
    ([*SFT, "--set", "runtime.devise=cpu"], "{suite}: runtime: unknown key 'devise'. Did you mean 'device'?"),
    ([*SFT, "--set", "gates={{ifeval.prompt_strict: '>= stf'}}"], "{suite}: gates.ifeval.prompt_strict"),
    ([*SFT, "--name", "a b"], "--name a b: letters, digits, - and _, beginning with a letter."),
]


@pytest.mark.parametrize(("words", "printed"), CASES, ids=[printed[:40] for _, printed in CASES])
def test_mistakes_end_with_2_before_anything_runs(
    words: list[str], printed: str, chain: SimpleNamespace, capsys: Capture
) -> None:
    places = {
        "file": chain.file, "dir": str(chain.folder), "suite": chain.suite, "plain": chain.plain,
        "ppo": key_of(chain, "ppo")[:12], "prompts": key_of(chain, "prompts")[:12],
    }  # fmt: skip
    filled = [word.format(**places) for word in words] + ["--store", chain.store]
    before = {path for path in Path(chain.store).rglob("*") if "locks" not in path.parts}
    assert main(["eval", *filled]) == 2
    captured = capsys.readouterr()
    assert printed.format(**places) in captured.err, captured.err
    assert "Traceback" not in captured.err and "stages.evaluate" not in captured.err
    assert captured.out == ""
    assert {path for path in Path(chain.store).rglob("*") if "locks" not in path.parts} == before


def test_table_shows_reward_models_without_other_metrics(tmp_path: Path, capsys: Capture) -> None:
    from align.cli.evaluate import print_scorecard

    def rate(value: float) -> dict[str, object]:
        return {"value": value, "low": value - 0.125, "high": value + 0.125, "n": 399, "method": "wilson"}

    report = {
        "pairs": 399,
        "ties": 2,
        "as_labeled": rate(0.625),
        "longer": rate(0.5),
        "true": None,
        "margin": rate(1.25),
    }
    card = {
        "base": None, "reference": "sft", "primary": "", "policies": ["sft"], "differences": [], "metrics": {},
        "tasks": {"hh": {"title": "Reward-model pairs"}}, "estimates": {"sft": {}}, "gates": [], "flags": [],
        "reward_models": [{"stage": "rm", "task": "hh", **report}, {"stage": "rm-b", "task": "pairs", **report}],
    }  # fmt: skip
    (tmp_path / "scorecard.json").write_text(json.dumps(card))
    print_scorecard(tmp_path / "scorecard.json")
    printed = capsys.readouterr().out
    assert "rm on Reward-model pairs" in printed and "rm-b on held-out pairs" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["pairs", "399", "399"] in lines
    assert ["ordered", "right,", "as", "labeled", "0.625", "0.625"] in lines
    assert ["0.500", "to", "0.750", "0.500", "to", "0.750"] in lines
    assert "by gold score" not in printed
    assert "sft" not in printed, "a table of systems without a number is left out"


def test_what_a_model_or_a_task_is_called_is_shown_and_never_run(tmp_path: Path, capsys: Capture) -> None:
    from align.cli.evaluate import print_scorecard

    hostile = "[bold red]x\x1b[2J"
    card = {
        "base": None, "reference": hostile, "primary": "gold", "policies": [hostile], "differences": [], "tasks": {},
        "metrics": {"gold": {"title": hostile, "better": "higher", "unit": "", "meaning": "", "task": "prompts"}},
        "estimates": {hostile: {"gold": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4, "method": "bootstrap"}}},
        "gates": [], "flags": [{"policy": hostile, "kind": "eos", "text": hostile}],
    }  # fmt: skip
    (tmp_path / "scorecard.json").write_text(json.dumps(card))
    print_scorecard(tmp_path / "scorecard.json")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert printed.count("[bold red]x\\x1b[2J") == 3, "the system, the metric, the flag"
    assert "0.250 to 0.750" in printed


def test_a_metric_that_is_called_by_its_title_is_named_once(tmp_path: Path, capsys: Capture) -> None:
    from align.cli.evaluate import print_scorecard

    metrics = {"polite": prompt_set_metric("polite", "higher", "score", ""), "length": PROMPT_SET_METRICS["length"]}
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4, "method": "bootstrap"}
    card = {
        "base": None, "reference": "sft", "primary": "polite", "policies": ["sft"], "differences": [], "tasks": {},
        "metrics": metrics, "estimates": {"sft": dict.fromkeys(metrics, estimate)}, "gates": [], "flags": [],
    }  # fmt: skip
    (tmp_path / "scorecard.json").write_text(json.dumps(card))
    print_scorecard(tmp_path / "scorecard.json")
    words = capsys.readouterr().out.split()
    assert words.count("polite") == 1 and words.count("length") == 2


# --- an evaluation of one's own ---------------------------------------------------------------------------------------

FIVE_LINES = (
    """\
prompts: {folder}/sums.yaml
metrics: [own_grading:is_right, {{function: own_grading:count_words, name: words, better: lower}}]
""",
    """\
kind: prompts
sources: [{{type: files, paths: [{folder}/sums.jsonl], columns: {{prompt: ask}}, keep: [answer]}}]
test_size: 1.0
""",
)
GRADING = '''
def is_right(rows, responses):
    """Return 1 for a response that is the row's answer."""
    return [float(str(row["answer"]) in response) for row, response in zip(rows, responses)]

def count_words(rows, responses):
    return [float(len(response.split()) + row["answer"]) for row, response in zip(rows, responses)]
'''


def test_prompts_and_functions_make_an_evaluation(
    chain: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "own_grading.py").write_text(GRADING)
    monkeypatch.syspath_prepend(str(tmp_path))
    records = [{"ask": f"{number} and 1?", "answer": number + 1} for number in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    suite, recipe = (text.format(folder=tmp_path) for text in FIVE_LINES)
    assert len((suite + recipe).splitlines()) == 5
    (tmp_path / "own.yaml").write_text(suite)
    (tmp_path / "sums.yaml").write_text(recipe)
    words = ["--set", "runtime={engine: {name: transformers}, device: cpu}", "--set", "max_tokens=8",
             "--set", "bootstrap=200", "--set", "name=my-sums", "--set", "gates={words: '>= 0'}"]  # fmt: skip
    named = [f"{chain.file}:{stage}" for stage in ("sft", "ppo")]
    own = ["--suite", str(tmp_path / "own.yaml"), "--store", chain.store, "--output", str(tmp_path / "out")]
    assert main(["eval", *named, *own, *words]) == 0
    printed = capsys.readouterr().out
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert card["primary"] == "is_right" and list(card["metrics"])[:2] == ["is_right", "words"]
    described = {name: (entry["title"], entry["better"], entry["meaning"]) for name, entry in card["metrics"].items()}
    assert described["is_right"] == ("is_right", "higher", "1 for a response that is the row's answer")
    assert described["words"] == ("words", "lower", "score by own_grading:count_words")
    assert {estimates["is_right"]["n"] for estimates in card["estimates"].values()} == {6}
    assert min(estimates["words"]["value"] for estimates in card["estimates"].values()) >= 3.5  # the mean answer
    assert "is_right" in printed and "Gold" not in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "is_right" in page and "Gold score" not in page
    (first, *_) = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert set(first["responses"]["sft"][0]["scores"]) == {"is_right", "words"}
    assert first["row"] == {"answer": int(first["prompt"][0]["content"].split()[0]) + 1}
    assert "my-sums" in Store(Path(chain.store)).runs()


GAME = """
class Echo:
    def reset(self, row):
        self.asked, self.said = row["prompt"][0]["content"], []
        return self.asked

    def step(self, message: str):
        self.said.append(message)
        return len(self.said) == 2 or "And again?"

    def score(self):
        return {"long": float(len(self.said[-1]) > 1), "asked": float(self.asked.endswith("and 1?"))}
"""
PLAYED = """\
rows: {{sums: {folder}/sums.yaml}}
tasks:
  echo:
    {{task: environment, rows: sums, success: asked, environment: {{class: "own_game:Echo", max_tokens: 40}}}}
"""


def test_a_suite_plays_the_rows_of_a_recipe_in_an_environment(
    chain: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_game.py").write_text(GAME)
    monkeypatch.syspath_prepend(str(tmp_path))
    records = [{"ask": f"{number} and 1?", "answer": number + 1} for number in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "sums.yaml").write_text(FIVE_LINES[1].format(folder=tmp_path))
    (tmp_path / "game.yaml").write_text(PLAYED.format(folder=tmp_path))
    words = ["--set", "runtime={engine: {name: transformers}, device: cpu}", "--set", "bootstrap=200"]
    out = tmp_path / "out"
    suite = ["--suite", str(tmp_path / "game.yaml"), "--store", chain.store, "--output", str(out)]
    assert main(["eval", f"{chain.file}:sft", f"{chain.file}:ppo", *suite, *words]) == 0
    card = json.loads((out / "scorecard.json").read_text())
    assert list(card["metrics"]) == [f"echo.{name}" for name in ("success", "score", "turns", "failure_rate")]
    assert {row["policy"] for row in card["differences"]} == {"sft", "ppo"}
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert sorted(sample["prompt"][0]["content"] for sample in samples) == [record["ask"] for record in records]
    for sample in samples:
        for (episode,) in sample["responses"].values():
            if episode["stop"] == "finished":
                assert episode["turns"][1]["prompt"] == "And again?" and episode["parts"]["asked"] == 1
    assert "success rate" in (out / "report.html").read_text()


def test_names_of_rows_in_a_suite_are_its_own(chain: SimpleNamespace, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "game.yaml").write_text("rows: [sums]\n")
    command = ["eval", f"{chain.file}:sft", "--suite", str(tmp_path / "game.yaml"), "--store", chain.store]
    assert main(command) == 2
    assert "rows is ['sums']; name each: `rows: {sums: sums.yaml}`" in capsys.readouterr().err
    (tmp_path / "game.yaml").write_text(f"rows: {{sft: {key_of(chain, 'prompts')}}}\n")
    assert main(command) == 2
    assert "rows.sft: another input is called 'sft'; choose another name." in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        "{metrics: [gold, gold]}",
        "{score: gold, metrics: [gold]}",
        "{metrics: [{function: mine:f, name: reward}]}",
        "{score: mine:reward}",
        "{score: [{function: gold}], metrics: [mine:score]}",
        "{metrics: [{function: mine:f, better: highest}]}",
        "{metrics: [gold], prompts: null, tasks: {ifeval: {files: [x]}}}",
    ],
)
def test_wrong_metric_functions_are_named(refused: Refused, fields: str) -> None:
    block = {"policies": ["sft"], "reference": "sft", "prompts": "data"} | yaml.safe_load(fields)
    refused(validate, EvaluateConfig, block, "mine.yaml")
