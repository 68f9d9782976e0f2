"""``align plan --hardware`` as a user runs it: what fits is shown, what does not is refused with a remedy."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.capacity.estimators import training as memory_training
from align.cli.main import main
from align.pipeline.pipeline import Pipeline
from align.store.store import Store
from tests.support.capacity.models import MISTRAL, SEVENTY
from tests.support.records import put_record


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    file = tmp_path / "large.yaml"
    revision = "0" * 40
    file.write_text(
        "name: large\nstages:\n"
        f"  model: {{source: some/model, revision: '{revision}'}}\n"
        f"  data: {{recipe: {Path('data_recipes/embedded.yaml').absolute()}}}\n"
        "  sft: {model: model, data: data, learning_rate: 1.0e-5, batch_size: 64, max_length: 2048}\n"
        "  sample: {policy: sft, prompts: data, score: gold}\n"
        "  reward: {model: sft, data: sample, learning_rate: 1.0e-5, batch_size: 64, max_length: 2048}\n"
        "  dpo: {policy: sft, data: sample, learning_rate: 1.0e-6, batch_size: 64, max_length: 2048}\n"
        "  ppo: {policy: sft, prompts: data, reward: reward, learning_rate: 1.0e-6, rollout_batch: 128}\n"
    )
    return file


@pytest.fixture
def plan(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command for a model of this config; returns exit code, output, errors."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(Path(__file__).parents[2])

    def run(config: dict[str, Any] | None, *words: str) -> tuple[int, str, str]:
        options = []
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
            options = ["--model-config", f"model={tmp_path / 'config.json'}"]
        code = main(["plan", str(pipeline), "--store", str(tmp_path / "store"), *options, *words])
        return code, *capsys.readouterr()

    return run


def stages(text: str) -> dict[str, Any]:
    return {stage["stage"]: stage for stage in json.loads(text)["stages"]}


def test_seven_billion_in_full_need_sharing_and_get_it(plan: Any) -> None:
    code, out, err = plan(MISTRAL, "--hardware", "8xh100", "--rows", "10000", "--json")
    assert (code, err) == (0, "")
    planned = stages(out)
    assert list(planned) == ["sft", "sample", "reward", "dpo", "ppo"]
    for stage in (way for name, way in planned.items() if name != "sample"):
        best, fits = stage["options"][0], [way for way in stage["options"] if way["fits"]]
        assert best["fits"] and best["strategy"] in ("fsdp2", "deepspeed") and best["peak"] < 79.1 * 2**30
        assert best["time"]["seconds"] == min(way["time"]["seconds"] for way in fits)
        assert sum(best["parts"].values()) == best["peak"]
        assert stage["parameters"] == 7_241_732_096
        ddp = next(way for way in stage["options"] if way["strategy"] == "ddp")
        assert not ddp["fits"] and "GiB, usable are 75.1" in ddp["why_not"]
    sft = planned["sft"]
    assert (sft["rows"], planned["ppo"]["rows"]) == (10000, 100 * 128)
    assert sft["options"][0]["time"]["tokens"] == 10000 * 2048
    assert sft["dollars"] == pytest.approx(sft["options"][0]["time"]["seconds"] / 3600 * 8 * 2.69)
    low, high = sft["dollars_range"]
    assert low < sft["dollars"] < high and high == pytest.approx(sft["options"][0]["time"]["slowest"] / 450 * 2.69)
    assert sft["measured_on_gpu"] is sft["options"][0]["time"]["measured_on_gpu"] is False
    assert {"reference", "critic"} <= set(planned["ppo"]["options"][0]["parts"])


@pytest.mark.parametrize(("config", "card"), [(SEVENTY, "1xa100-40"), (MISTRAL, "1xl4")])
def test_what_fits_nowhere_is_refused_with_remedies_that_hold(plan: Any, config: dict[str, Any], card: str) -> None:
    code, out, err = plan(config, "--hardware", card, "--json")
    planned = stages(out)
    nowhere = [name for name, stage in planned.items() if not stage["options"][0]["fits"]]
    assert code == 2 and any(planned[name]["remedies"] for name in nowhere) and "Traceback" not in err
    for name in nowhere:
        line = next(line for line in err.splitlines() if f"large.yaml: stages.{name} fits on" in line)
        remedies = planned[name]["remedies"]
        assert all(remedy in line for remedy in remedies)
        assert remedies or line.endswith("Take a smaller model.")
        for remedy in remedies:
            words = ["--hardware", card, *shlex.split(remedy)]  # a second --hardware takes the first one's place
            assert stages(plan(config, *words, "--json")[1])[name]["options"][0]["fits"], remedy


def test_adapters_on_four_bits_fit_where_full_tuning_does_not(plan: Any) -> None:
    words = ["--hardware", "1xa100-40", "--json"]
    full = stages(plan(MISTRAL, *words)[1])["sft"]["options"]
    four = stages(plan(MISTRAL, *words, "--set", "stages.sft.tuning={method: qlora}")[1])["sft"]["options"]
    assert not any(way["fits"] and way["strategy"] == "single" for way in full)
    assert four[0]["fits"] and four[0]["strategy"] == "single"


def test_the_largest_micro_batch_fits_and_one_more_does_not(plan: Any) -> None:
    from align.capacity.hardware import parse_hardware
    from align.capacity.layouts import Strategy
    from align.capacity.training_ways import device_parts
    from align.config.stages.sft import SftConfig
    from align.models.architecture import architecture_of

    config = SftConfig(model="m", data="d", learning_rate=1e-3, tuning={"method": "lora"}, batch_size=4096)
    job = memory_training.job(config, {"model": [architecture_of(MISTRAL)]}, None)
    hardware = parse_hardware("h100")
    ways = stages(
        plan(MISTRAL, "--hardware", "h100", "--set", "stages.sft.tuning={method: lora}",
             "--set", "stages.sft.max_length=1024", "--json")[1]
    )["sft"]["options"]  # fmt: skip
    largest = next(
        w["largest_micro_batch"] for w in ways if w["strategy"] == "single" and not w["gradient_checkpointing"]
    )
    sizes = [sum(device_parts(job, hardware, Strategy("single"), rows).values()) for rows in (largest, largest + 1)]
    usable = hardware.device.usable + hardware.device.context
    assert sizes[0] <= usable < sizes[1]


def test_the_table_says_it_in_words(plan: Any) -> None:
    code, out, _ = plan(MISTRAL, "--hardware", "8xh100", "--fill", "0.5", "--price", "2")
    assert code == 0
    assert "8xh100: 79.1 GiB each, 2 dollars an hour each" in out
    assert "sft: 7,241.7 million parameters, full, 64 rows a step" in out
    assert "time for 1,000 of them, since its data is not there yet (--rows)" in out
    assert "of 0.5 of the greatest length" in out
    assert "all of these stages:" in out and "nothing of them was measured on a GPU" in out
    assert out.count("  *  ") == 5


def test_what_runtime_launch_asks_for_is_what_is_planned(plan: Any) -> None:
    launch = ["--set", "runtime.launch={processes: 4, strategy: fsdp2}", "--hardware", "8xh200"]
    code, out, _ = plan(MISTRAL, *launch, "--json")
    for stage in (way for way in stages(out).values() if way["kind"] != "sample"):
        assert [way["strategy"] for way in stage["options"]] == ["fsdp2"]
    sft = stages(out)["sft"]["options"][0]
    assert sft["parts"]["optimizer"] == pytest.approx(8 * 7_241_732_096 / 4)
    text = plan(MISTRAL, *launch)[1]
    assert code == 0 and text.count("runtime.launch asks for this way, on 4 of 8 devices") == 4
    override = ["--set", "runtime.stages={sft: {launch: {processes: 8}}}"]
    assert stages(plan(MISTRAL, *launch, *override, "--json")[1])["sft"]["options"][0]["strategy"] == "fsdp2"


EVALUATED = """\
  judged:
    stage: evaluate
    policies: [model, sft, dpo]
    reference: sft
    prompts: data
    reward: reward
    heldout: data
    max_prompts: 50
    baselines: {best: {of: sft, best_of: 4}}
    tasks: {lm_eval: {tasks: [arc_easy]}, ifeval: {files: [none.jsonl], max_items: 20, max_tokens: 256}}
  pairs: {stage: synthesize, model: sft, prompts: data, task: {type: pairs}, judge: {}, judge_model: dpo}
  asked:
    {stage: synthesize, endpoint: {url: "http://127.0.0.1:1/v1", model: some}, prompts: data, task: {type: responses}}
"""


@pytest.fixture
def evaluated(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none.jsonl").write_text('{"key": 1, "prompt": "p", "instruction_id_list": [], "kwargs": []}\n' * 30)
    pipeline.write_text(pipeline.read_text() + EVALUATED.replace("none.jsonl", str(tmp_path / "none.jsonl")))


def test_stages_that_generate_are_planned_and_paid_for(plan: Any, evaluated: None) -> None:
    code, out, _ = plan(MISTRAL, "--hardware", "8xh100", "--rows", "200", "--json")
    planned = stages(out)
    assert code == 0 and list(planned)[-3:] == ["judged", "pairs", "asked"]
    sample, judged, pairs = (planned[name]["options"][0] for name in ("sample", "judged", "pairs"))
    assert (sample["way"], sample["time"]["sampled"]) == ("4 servers, tensor_parallel 2", 200 * 4 * 64)
    # three checkpoints and four of the best of four: 50 prompts of 64 tokens, 20 of a task of 256
    assert judged["time"]["sampled"] == 7 * (50 * 64 + 20 * 256)
    # 4 answers to each prompt, and two verdicts about each two of them
    assert pairs["time"]["sampled"] == 200 * (4 + 12) * 512
    for option in (sample, judged, pairs):
        assert sum(option["parts"].values()) == option["peak"] <= 79.1 * 2**30
    assert any("lm_eval: lm-eval's own tasks" in note for note in planned["judged"]["notes"])
    assert (planned["asked"]["options"], planned["asked"]["external"]) == ([], "some, a server, answers")
    text = plan(MISTRAL, "--hardware", "8xh100", "--rows", "200")[1]
    assert "asked: some, a server, answers; nothing of it is counted." in text
    assert "servers are a setting of the run: runtime.rollouts: {servers: 4, tensor_parallel: 2}" in text
    ranges = [stage["dollars_range"] for stage in planned.values() if stage["dollars"]]
    low, high = (sum(bounds[side] for bounds in ranges) for side in (0, 1))
    assert f"all of these stages, but for what is not counted: {low:,.2f} - {high:,.2f} dollars" in text


def test_episodes_are_counted_at_their_longest(plan: Any, evaluated: None, tmp_path: Path) -> None:
    environment = "{class: tests.support.environments.buttons:Buttons, max_tokens: 100}"
    sampling = "samples: 3, temperature: 1.0, max_items: 10"
    task = f"{{files: [{tmp_path}/none.jsonl], {sampling}, environment: {environment}}}"
    override = ["--set", f"stages.judged.tasks={{environment: {task}}}", "--rows", "200", "--json"]
    code, out, err = plan(MISTRAL, "--hardware", "8xh100", *override)
    assert code == 0, err
    judged = stages(out)["judged"]
    # best of four plays no episodes: three checkpoints play 10 rows three times
    assert judged["options"][0]["time"]["sampled"] == 7 * 50 * 64 + 3 * 10 * 3 * 100
    assert any("environment: the time of the environment and its tools is not counted" in n for n in judged["notes"])


def test_episodes_that_become_data_are_counted_at_their_longest(plan: Any, evaluated: None) -> None:
    environment = "{class: tests.support.environments.buttons:Buttons, max_tokens: 100}"
    sampled = ["--set", "stages.sample.max_tokens=100", "--set", f"stages.sample.environment={environment}"]
    made = ["--set", f"stages.asked.environment={environment}"]
    code, out, err = plan(MISTRAL, "--hardware", "8xh100", *sampled, *made, "--rows", "200", "--json")
    assert code == 0, err
    planned = stages(out)
    assert planned["sample"]["options"][0]["time"]["sampled"] == 200 * 4 * 100
    for name in ("sample", "asked"):
        assert "The time of the environment and its tools is not counted." in planned[name]["notes"]


def test_a_stage_whose_engine_does_not_fit_is_refused_with_remedies_that_hold(plan: Any) -> None:
    code, out, err = plan(MISTRAL, "--hardware", "1xa100-40", "--json")
    line = next(line for line in err.splitlines() if "stages.sample fits on a100-40 in no way" in line)
    remedies = stages(out)["sample"]["remedies"]
    assert code == 2 and "--set runtime.engine.gpu_memory=0.9" in remedies
    for remedy in remedies:
        assert remedy in line
        words = ["--hardware", "1xa100-40", *shlex.split(remedy), "--json"]
        assert stages(plan(MISTRAL, *words)[1])["sample"]["options"][0]["fits"], remedy


def test_servers_that_run_already_are_not_counted(plan: Any) -> None:
    words = ["--hardware", "8xh100", "--set", "runtime.rollouts.addresses=[http://127.0.0.1:8000]", "--json"]
    sample = stages(plan(MISTRAL, *words)[1])["sample"]
    assert [way["way"] for way in sample["options"]] == ["servers that run already"]
    assert "their memory and time are not counted" in " ".join(sample["notes"])


def test_one_device_shards_and_offloads_nothing(plan: Any) -> None:
    code, out, err = plan(MISTRAL, "--hardware", "h100", "--json")
    assert code == 2 and "stages.sft fits on h100 in no way" in err
    for stage in (way for way in stages(out).values() if way["kind"] != "sample"):
        assert {way["strategy"] for way in stage["options"]} == {"single"}


def test_ways_that_the_stage_refuses_are_none(plan: Any) -> None:
    """QLoRA is not sharded: the table does not propose what ``align run`` then refuses."""
    words = ["--hardware", "8xa100-40", "--set", "stages.sft.tuning={method: qlora}", "--json"]
    code, out, err = plan(SEVENTY, *words)
    sft = stages(out)["sft"]
    assert code == 2 and not any(way["fits"] for way in sft["options"])
    assert sft["options"][0]["strategy"] == "ddp", "what lacks memory alone is nearest"
    sharded = [way for way in sft["options"] if way["strategy"] != "ddp"]
    assert sharded and all("keeps weights in 4 bits, which strategy" in way["why_not"] for way in sharded)
    assert "stages.sft fits on 8xa100-40 in no way; nearest is ddp, checkpointing" in err
    four = stages(plan(MISTRAL, *words)[1])["sft"]["options"]
    assert four[0]["fits"] and four[0]["strategy"] == "ddp"


def test_a_launch_that_does_not_fit_gets_one_that_does(plan: Any) -> None:
    """Not another machine: the launch says on how many devices the stage runs."""
    words = ["--hardware", "8xh100", "--set", "runtime.launch={processes: 4, strategy: ddp}"]
    code, out, err = plan(MISTRAL, *words, "--json")
    remedies = stages(out)["sft"]["remedies"]
    assert code == 2 and "nearest is ddp" in err and not any("--hardware" in remedy for remedy in remedies)
    assert remedies[0].startswith("--set runtime.launch='")
    for remedy in remedies:
        actual = stages(plan(MISTRAL, *words, *shlex.split(remedy), "--json")[1])["sft"]["options"]
        assert len(actual) == 1 and actual[0]["fits"], remedy


def test_another_micro_batch_than_the_run_s_is_a_setting_to_make(plan: Any) -> None:
    words = ["--hardware", "h100", "--set", "stages.sft.tuning={method: lora}"]
    _, out, _ = plan(MISTRAL, *words)
    assert "the micro-batch is a setting of the stage: micro_batch_size: 2" in out
    _, out, _ = plan(MISTRAL, *words, "--set", "stages.sft.micro_batch_size=2")
    sft = out.split("\nsft: ")[1].split("\nsample: ")[0]
    assert "the micro-batch is a setting" not in sft


def test_more_processes_than_devices_are_refused(plan: Any) -> None:
    code, _, err = plan(MISTRAL, "--hardware", "2xh100", "--set", "runtime.launch.processes=8")
    assert code == 2 and "asks for 1 x 8 processes (runtime.launch), and --hardware 2xh100 has 1 x 2 devices" in err


def test_a_batch_that_cannot_be_shared_gets_its_own_remedy(plan: Any) -> None:
    code, _, err = plan(MISTRAL, "--hardware", "8xh100", "--set", "stages.sft.batch_size=4")
    assert code == 2 and "What does: 8 rows a step, which divide among 8 devices" in err


def test_a_model_that_is_not_here_is_said_to_be_unknown(plan: Any) -> None:
    code, out, _ = plan(None, "--hardware", "8xh100")
    assert code == 0 and "sft: not known: the config.json of 'some/model' is not on this machine" in out
    assert "--model-config" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "8xh10o"], "--hardware 8xh10o: expected"),
        (["--price", "2"], "--price goes with --hardware"),
        (["--hardware", "cpu", "--model-config", "mdel=x"], "there is no stage 'mdel'. Did you mean 'model'?"),
        (["--hardware", "cpu", "--model-config", "model"], "expected STAGE=FILE"),
        (["--hardware", "cpu", "--model-config", "model=none.json"], "none.json cannot be read"),
    ],
)
def test_wrong_options_are_refused(plan: Any, words: list[str], message: str) -> None:
    code, _, err = plan(None, *words)
    assert code == 2 and message in err


@pytest.mark.parametrize("words", [["--price", "0"], ["--fill", "1.5"], ["--rows", "0"]])
def test_numbers_out_of_range_are_refused(plan: Any, words: list[str]) -> None:
    code, _, err = plan(None, "--hardware", "cpu", *words)
    assert code == 2 and f"'{words[1]}' is not" in err


def test_nothing_heavy_is_imported(pipeline: Path, tmp_path: Path) -> None:
    words = ["plan", "pipelines/quickstart.yaml", "--hardware", "8xh100", "--store", str(tmp_path)]
    script = (
        f"import sys; from align.cli.main import main; main({words!r}); "
        "print([n for n in ('torch', 'transformers', 'trl', 'peft') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_kto_makes_two_rows_of_each_pair(plan: Any, pipeline: Path, tmp_path: Path) -> None:
    stage = "  kto: {policy: sft, data: sample, learning_rate: 1.0e-6, batch_size: 64, max_length: 512}\n"
    pipeline.write_text(pipeline.read_text() + stage)
    sample = Pipeline.load(pipeline).nodes["sample"]
    folder = Store.open(tmp_path / "store").folder("sample", sample.key)
    folder.mkdir(parents=True)
    metrics = {"train_pairs": 1000}
    put_record(folder, key=sample.key, stage="sample", kind="sample", makes=sample.makes, metrics=metrics)
    planned = stages(plan(MISTRAL, "--hardware", "8xh100", "--json")[1])
    assert (planned["dpo"]["rows"], planned["kto"]["rows"]) == (1000, 2000)
