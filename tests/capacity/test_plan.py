"""``align plan --hardware`` as a user runs it: the ways that fit, and remedies for a stage that fits in none."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.capacity import estimate_training
from align.capacity.plan import fit_to_memory
from align.cli.main import main
from align.config.runtime import Runtime
from align.config.stages.policy_gradient import GrpoConfig
from align.config.stages.sample import SampleConfig
from align.config.stages.sft import SftConfig
from align.pipeline.context import MemoryGuess
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from tests.support.capacity.models import MISTRAL, SEVENTY


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


def test_full_tuning_of_7b_is_sharded(plan: Any) -> None:
    code, out, err = plan(MISTRAL, "--hardware", "8xh100", "--json")
    assert (code, err) == (0, "")
    planned = stages(out)
    assert list(planned) == ["sft", "sample", "reward", "dpo", "ppo"]
    for stage in (way for name, way in planned.items() if name != "sample"):
        best = stage["options"][0]
        assert best["fits"] and best["strategy"] in ("fsdp2", "deepspeed") and best["peak"] < 79.1 * 2**30
        assert sum(best["parts"].values()) == best["peak"]
        assert stage["parameters"] == 7_241_732_096 and stage["measured_on_gpu"] is False
        ddp = next(way for way in stage["options"] if way["strategy"] == "ddp")
        assert not ddp["fits"] and "GiB, usable are 75.1" in ddp["why_not"]
    assert {"reference", "critic"} <= set(planned["ppo"]["options"][0]["parts"])


def test_simplest_way_that_fits_is_first(plan: Any) -> None:
    lora = ["--set", "stages.sft.tuning={method: lora}"]
    options = stages(plan(MISTRAL, "--hardware", "8xh100", *lora, "--json")[1])["sft"]["options"]
    assert [way["way"] for way in options[:2]] == ["ddp", "ddp, checkpointing"]
    offloads = [way["offload"] != "none" for way in options]
    assert offloads == sorted(offloads)


@pytest.mark.parametrize(("config", "card"), [(SEVENTY, "1xa100-40"), (MISTRAL, "1xl4")])
def test_remedies_of_a_stage_that_fits_nowhere_work(plan: Any, config: dict[str, Any], card: str) -> None:
    code, out, err = plan(config, "--hardware", card, "--json")
    planned = stages(out)
    nowhere = [name for name, stage in planned.items() if not stage["options"][0]["fits"]]
    assert code == 2 and any(planned[name]["remedies"] for name in nowhere) and "Traceback" not in err
    for name in nowhere:
        line = next(line for line in err.splitlines() if f"large.yaml: stages.{name} fits on" in line)
        remedies = planned[name]["remedies"]
        assert all(remedy in line for remedy in remedies)
        assert remedies or "Use a smaller model" in line
        for remedy in remedies:
            words = ["--hardware", card, *shlex.split(remedy)]  # a second --hardware takes the first one's place
            assert stages(plan(config, *words, "--json")[1])[name]["options"][0]["fits"], remedy


def test_qlora_fits_if_full_tuning_does_not(plan: Any) -> None:
    words = ["--hardware", "1xa100-40", "--json"]
    full = stages(plan(MISTRAL, *words)[1])["sft"]["options"]
    four = stages(plan(MISTRAL, *words, "--set", "stages.sft.tuning={method: qlora}")[1])["sft"]["options"]
    assert not any(way["fits"] and way["strategy"] == "single" for way in full)
    assert four[0]["fits"] and four[0]["strategy"] == "single"


def test_largest_micro_batch_is_the_limit(plan: Any) -> None:
    from align.capacity.hardware import parse_hardware
    from align.capacity.sharding import Strategy, device_parts
    from align.models.compute.model_types import architecture_of

    config = SftConfig(model="m", data="d", learning_rate=1e-3, tuning={"method": "lora"}, batch_size=4096)
    job = estimate_training.job(config, {"model": [architecture_of(MISTRAL)]}, None)
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


MIXTURE = {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
           "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
           "num_experts_per_tok": 8, "moe_intermediate_size": 768, "num_local_experts": 32}  # fmt: skip


def test_activations_without_a_rule_are_not_counted(plan: Any) -> None:
    words = ["--hardware", "8xh200", "--set", "stages.sft.tuning={method: lora}"]
    without = MIXTURE | {"model_type": "gpt_oss", "intermediate_size": 2880, "num_hidden_layers": 12}
    best = stages(plan(without, *words, "--json")[1])["sft"]["options"][0]
    assert best["not_counted"] == ["activations"] and "activations" not in best["parts"]
    assert best["fits"] and best["largest_micro_batch"] is None
    table = plan(without, *words)[1].partition("\nsample")[0]
    assert "not counted" in table and "activations of gpt_oss with lora" in table
    # A mixture with a rule counts them, and offers a largest micro-batch.
    best = stages(plan(MIXTURE | {"model_type": "qwen3_moe"}, *words, "--json")[1])["sft"]["options"][0]
    assert best["not_counted"] == [] and best["parts"]["activations"] > 2**30
    assert 0 < best["largest_micro_batch"] < 64


def test_table_shows_each_stage(plan: Any) -> None:
    code, out, _ = plan(MISTRAL, "--hardware", "8xh100")
    assert code == 0
    assert out.startswith("8xh100: 79.1 GiB each\n")
    assert "sft: 7,241.7 million parameters, full, 64 rows a step" in out
    assert out.count("  *  ") == 5
    assert "more ways fit (--json has them)" in out


def test_strategy_of_runtime_launch_is_planned(plan: Any) -> None:
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


def test_stages_that_generate_are_planned(plan: Any, evaluated: None) -> None:
    code, out, err = plan(MISTRAL, "--hardware", "8xh100", "--json")
    assert code == 0, err
    planned = stages(out)
    assert list(planned)[-3:] == ["judged", "pairs", "asked"]
    sample, judged, pairs = (planned[name]["options"] for name in ("sample", "judged", "pairs"))
    for options in (sample, judged, pairs):
        assert len(options) == 1 and options[0]["fits"]
        assert sum(options[0]["parts"].values()) == options[0]["peak"] <= 79.1 * 2**30
    assert sample[0]["way"].startswith("one engine (")
    assert any("lm_eval: lm-eval's own tasks" in note for note in planned["judged"]["notes"])
    assert (planned["asked"]["options"], planned["asked"]["external"]) == ([], "some, a server, answers")
    assert "asked: some, a server, answers; no memory of it is counted." in plan(MISTRAL, "--hardware", "8xh100")[1]


def test_remedies_of_an_engine_that_does_not_fit_work(plan: Any) -> None:
    words = ["--hardware", "1xa100-40", "--set", "runtime.engine.gpu_memory=0.35", "--json"]
    code, out, err = plan(MISTRAL, *words)
    line = next(line for line in err.splitlines() if "stages.sample fits on a100-40 in no way" in line)
    remedies = stages(out)["sample"]["remedies"]
    assert code == 2 and remedies[:2] == ["--set runtime.engine.gpu_memory=auto", "--hardware l40s"]
    for remedy in remedies:
        assert remedy in line
        assert stages(plan(MISTRAL, *words, *shlex.split(remedy))[1])["sample"]["options"][0]["fits"], remedy


@pytest.mark.parametrize(
    ("rollouts", "note"),
    [
        ("{addresses: [http://127.0.0.1:8000]}", "Servers that already run sample; their memory is not counted."),
        ("{servers: 1, tensor_parallel: 4}", "Servers with tensor_parallel 4 sample; their memory is not counted."),
    ],
)
def test_servers_are_not_counted(plan: Any, rollouts: str, note: str) -> None:
    words = ["--hardware", "8xh100", "--set", f"runtime.rollouts={rollouts}", "--json"]
    sample = stages(plan(MISTRAL, *words)[1])["sample"]
    assert [way["way"] for way in sample["options"]] == ["one device"]
    assert note in sample["notes"]


def test_one_device_has_one_strategy(plan: Any) -> None:
    code, out, err = plan(MISTRAL, "--hardware", "h100", "--json")
    assert code == 2 and "stages.sft fits on h100 in no way" in err
    for stage in (way for way in stages(out).values() if way["kind"] != "sample"):
        assert {way["strategy"] for way in stage["options"]} == {"single"}


def test_refused_strategies_do_not_fit(plan: Any) -> None:
    """QLoRA is not sharded: the table does not propose what ``align run`` then refuses."""
    words = ["--hardware", "8xa100-40", "--set", "stages.sft.tuning={method: qlora}", "--json"]
    code, out, err = plan(SEVENTY, *words)
    sft = stages(out)["sft"]
    assert code == 2 and not any(way["fits"] for way in sft["options"])
    assert sft["options"][0]["strategy"] == "ddp", "a way that only lacks memory is nearest"
    sharded = [way for way in sft["options"] if way["strategy"] != "ddp"]
    assert sharded and all("keeps weights in 4 bits, which strategy" in way["why_not"] for way in sharded)
    assert "stages.sft fits on 8xa100-40 in no way; nearest is ddp, checkpointing" in err
    four = stages(plan(MISTRAL, *words)[1])["sft"]["options"]
    assert four[0]["fits"] and four[0]["strategy"] == "ddp"


def test_remedy_of_a_launch_is_another_launch(plan: Any) -> None:
    """Not another machine: the launch says on how many devices the stage runs."""
    words = ["--hardware", "8xh100", "--set", "runtime.launch={processes: 4, strategy: ddp}"]
    code, out, err = plan(MISTRAL, *words, "--json")
    remedies = stages(out)["sft"]["remedies"]
    assert code == 2 and "nearest is ddp" in err and not any("--hardware" in remedy for remedy in remedies)
    assert remedies[0].startswith("--set runtime.launch='")
    for remedy in remedies:
        actual = stages(plan(MISTRAL, *words, *shlex.split(remedy), "--json")[1])["sft"]["options"]
        assert len(actual) == 1 and actual[0]["fits"], remedy


def test_only_fixed_settings_are_named_to_change(plan: Any) -> None:
    def suggestions(*words: str) -> str:
        settings = ["--hardware", "24gb", "--set", "stages.sft.tuning={method: lora}"]
        out = plan(MISTRAL, *settings, *(part for word in words for part in ("--set", f"stages.sft.{word}")))[1]
        return "".join(line for line in out.partition("\nsample: ")[0].splitlines() if "; set " in line)

    assert suggestions() == "", "a run finds both"
    assert suggestions("micro_batch_size=64") == "  the stage has micro_batch_size: 64; set 4 or auto"
    assert suggestions("micro_batch_size=4") == ""
    assert suggestions("gradient_checkpointing=false").endswith("gradient_checkpointing: false; set true or auto")
    assert suggestions("gradient_checkpointing=true") == ""


def test_more_processes_than_devices_are_refused(plan: Any) -> None:
    code, _, err = plan(MISTRAL, "--hardware", "2xh100", "--set", "runtime.launch.processes=8")
    assert code == 2 and "asks for 1 x 8 processes (runtime.launch), and --hardware 2xh100 has 1 x 2 devices" in err


def test_indivisible_batch_gets_next_divisible_size(plan: Any) -> None:
    code, _, err = plan(MISTRAL, "--hardware", "8xh100", "--set", "stages.sft.batch_size=4")
    assert code == 2 and "What does: 8 rows a step, which divide among 8 devices" in err


def test_model_without_config_is_unknown(plan: Any) -> None:
    code, out, _ = plan(None, "--hardware", "8xh100")
    assert code == 0 and "sft: not known: the config.json of 'some/model' is not on this machine" in out
    assert "--model-config" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "8xh10o"], "--hardware 8xh10o: expected"),
        (["--model-config", "model=x"], "--model-config goes with --hardware"),
        (["--hardware", "cpu", "--price", "2"], "unrecognized arguments: --price 2"),
        (["--hardware", "cpu", "--model-config", "mdel=x"], "there is no stage 'mdel'. Did you mean 'model'?"),
        (["--hardware", "cpu", "--model-config", "model"], "expected STAGE=FILE"),
        (["--hardware", "cpu", "--model-config", "model=none.json"], "none.json cannot be read"),
    ],
)
def test_wrong_options_are_refused(plan: Any, words: list[str], message: str) -> None:
    code, _, err = plan(None, *words)
    assert code == 2 and message in err


def test_plan_imports_no_torch(pipeline: Path, tmp_path: Path) -> None:
    words = ["plan", "pipelines/quickstart.yaml", "--hardware", "8xh100", "--store", str(tmp_path)]
    script = (
        f"import sys; from align.cli.main import main; main({words!r}); "
        "print([n for n in ('torch', 'transformers', 'trl', 'peft') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


CARDS = """name: card
runtime: {{device: cuda, engine: {{name: vllm}}}}
stages:
  model: {{source: some/model, revision: '{revision}'}}
  data: {{recipe: {recipe}}}
  pairs: {{stage: sample, policy: model, prompts: data, score: gold}}
  trained: {{{stage}, learning_rate: 1.0e-4, tuning: {tuning}}}
"""
SFT = "stage: sft, model: model, data: data, max_length: 2048"
GRPO = "stage: grpo, policy: model, prompts: data, score: gold, max_prompt_tokens: 512, max_tokens: 1024"
PPO = GRPO.replace("grpo", "ppo") + ", critic: policy"
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
         "tie_word_embeddings": False}  # fmt: skip
QWEN3_4B = QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                    "num_attention_heads": 32, "tie_word_embeddings": True}  # fmt: skip
QWEN3_8B = QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                    "num_attention_heads": 32}  # fmt: skip
QWEN3_14B = QWEN3 | {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40,
                     "num_attention_heads": 40}  # fmt: skip
QWEN3_32B = QWEN3 | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                     "num_attention_heads": 64}  # fmt: skip
NO_PARTS: list[str] = []


@pytest.mark.parametrize(
    ("stage", "method", "config", "card", "host"),
    [
        (SFT, "lora", QWEN3_8B, "24gb", NO_PARTS),
        (SFT, "qlora", QWEN3_14B, "24gb", NO_PARTS),
        ("stage: dpo, policy: model, data: pairs, max_length: 2048", "lora", QWEN3_8B, "24gb", NO_PARTS),
        ("stage: reward, model: model, data: pairs, max_length: 2048", "lora", QWEN3_8B, "24gb", NO_PARTS),
        (GRPO, "lora", QWEN3_4B, "24gb", NO_PARTS),
        (PPO, "lora", QWEN3_4B, "24gb", NO_PARTS),
        (GRPO, "qlora", QWEN3_8B, "24gb", ["base"]),
        (SFT + ", trainer: {optim: adamw_8bit}", "full", QWEN3_8B, "80gb", ["optimizer"]),
        (GRPO, "lora", QWEN3_32B, "80gb", ["base"]),
        (GRPO, "qlora", QWEN3_32B, "80gb", ["base"]),
        (GRPO, "full", QWEN3_4B, "80gb", NO_PARTS),
    ],
)
def test_models_fit_the_cards_that_people_have(
    stage: str, method: str, config: dict[str, Any], card: str, host: list[str], pipeline: Path, plan: Any
) -> None:
    recipe = Path("data_recipes/embedded.yaml").absolute()
    tuning = f"{{method: {method}}}"
    pipeline.write_text(CARDS.format(revision="0" * 40, recipe=recipe, stage=stage, tuning=tuning))
    _, out, _ = plan(config, "--hardware", card, "--json")
    best = stages(out)["trained"]["options"][0]
    assert best["fits"] and best["strategy"] == "single" and best["host"] == host
    assert best["peak"] < {"24gb": 22.33, "80gb": 75.15}[card] * 2**30
    assert bool(best["host_memory"]) == bool(host)


def test_plan_refuses_an_engine_share_that_is_too_small(plan: Any, pipeline: Path) -> None:
    recipe = Path("data_recipes/embedded.yaml").absolute()
    pipeline.write_text(CARDS.format(revision="0" * 40, recipe=recipe, stage=GRPO, tuning="{method: lora}"))
    words = ["--hardware", "24gb", "--set", "runtime.engine.gpu_memory=0.3"]
    trained = stages(plan(QWEN3_4B, *words, "--json")[1])["trained"]
    # 7.5 GiB of weights, 0.2 of a cache for 1,536 tokens, 0.7 for the driver; 0.3 of 23.5 is 7.05
    assert {way["why_not"] for way in trained["options"]} == {
        "one sequence needs 8.4 GiB, the engine has 7.0 (runtime.engine.gpu_memory 0.3)"
    }
    assert trained["remedies"][0] == "--set runtime.engine.gpu_memory=auto"
    enough = stages(plan(QWEN3_4B, *words[:2], "--set", "runtime.engine.gpu_memory=0.4", "--json")[1])["trained"]
    assert enough["options"][0]["fits"]


def settings_on(
    kind: str, config: Any, folder: Path, gpu: tuple[int, int] | None, **runtime: Any
) -> tuple[Runtime, MemoryGuess | None]:
    """Return what a process of a stage chooses whose input models have the config of the 8B model."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(QWEN3_8B))
    policy = Artifact("base", Kind.POLICY, folder, {"key": "0"})
    data = Artifact("data", Kind.INSTRUCTIONS, folder, {"key": "1"})
    names = {"model": policy, "policy": policy, "data": data, "prompts": data, "policies": [policy], "reward": None}
    settings = Runtime.model_validate({"device": "cuda", "engine": {"name": "vllm"}} | runtime)
    return fit_to_memory(STAGES[kind], config, names, settings, gpu)


def test_a_process_fits_its_memory(tmp_path: Path) -> None:
    gib = 2**30
    grpo = GrpoConfig(policy="m", prompts="p", score="gold", tuning={"method": "qlora"}, max_prompt_tokens=512,
                      max_tokens=1024, learning_rate=1e-4)  # fmt: skip
    runtime, guess = settings_on("grpo", grpo, tmp_path, (int(23.5 * gib), 24 * gib))
    assert (runtime.offload, guess) == (["base"], MemoryGuess(16, True))
    # Of 0.95 x 23.5 - 0.7 GiB, adapters with their state and the scales of 4 bits stay beside the engine.
    share = runtime.engine.gpu_memory
    assert isinstance(share, float) and share * 24 == pytest.approx(0.95 * 23.5 - 0.7 - 0.60, abs=0.01)
    awake, _ = settings_on("grpo", grpo, tmp_path, (80 * gib, 80 * gib), engine={"name": "vllm", "sleep": False})
    assert awake.offload == [] and awake.engine.gpu_share < 0.95 - 0.7 / 80 - 5.8 / 80
    asked, _ = settings_on("grpo", grpo, tmp_path, (80 * gib, 80 * gib), engine={"name": "vllm", "gpu_memory": 0.3})
    assert asked.engine.gpu_memory == 0.3

    sft = SftConfig(model="m", data="d", tuning={"method": "lora"}, max_length=2048, learning_rate=1e-4)
    runtime, guess = settings_on("sft", sft, tmp_path, (int(23.5 * gib), 24 * gib))
    assert (runtime.offload, guess) == ([], MemoryGuess(4, True))
    assert settings_on("sft", sft, tmp_path, (80 * gib, 80 * gib))[1] == MemoryGuess(4, False)
    sample = SampleConfig(policy="m", prompts="p")
    runtime, guess = settings_on("sample", sample, tmp_path, (40 * gib, 80 * gib))
    assert guess is None and runtime.engine.gpu_share == pytest.approx((0.95 * 40 - 0.7) / 80)


def test_a_process_keeps_its_settings_without_a_rule(tmp_path: Path) -> None:
    runtime, guess = settings_on("data", None, tmp_path, None)
    assert (runtime.offload, runtime.engine.gpu_memory, guess) == ("auto", "auto", None)
    vera = SftConfig(model="m", data="d", tuning={"method": "peft", "type": "vera"}, learning_rate=1e-4)
    runtime, guess = settings_on("sft", vera, tmp_path, (80 * 2**30, 80 * 2**30))
    assert (runtime.offload, runtime.engine.gpu_share, guess) == ("auto", 0.35, None)


def test_first_line_has_the_whole_setting(plan: Any, pipeline: Path) -> None:
    recipe = Path("data_recipes/embedded.yaml").absolute()

    def first_line(stage: str, tuning: str, *words: str) -> str:
        text = CARDS.format(revision="0" * 40, recipe=recipe, stage=stage, tuning=tuning)
        # The rate follows from the size of a model that is not on this machine.
        pipeline.write_text(text.replace(", learning_rate: 1.0e-4", ""))
        code, out, err = plan(QWEN3_8B, *words)
        assert code == 0, err
        return next(line for line in out.partition("\ntrained: ")[2].splitlines() if line.startswith("  fits"))

    # 4 operations for each of 7.57e9 parameters in matrices, and 2 in the recomputation, at 40 % of 165 TFLOP/s
    assert first_line(SFT, "{method: lora}", "--hardware", "24gb") == (
        "  fits: 21.9 of 22.3 GiB; lora r16, bfloat16 base, recomputation, micro-batch 4; about 1,500 tokens/s if the "
        "card reaches 40% of its peak (not measured)"
    )
    assert first_line(GRPO, "{method: qlora}", "--hardware", "24gb") == (
        "  fits: 19.9 of 22.3 GiB; qlora r16, 4-bit base, recomputation, micro-batch 16, base in host memory"
    )
    full = first_line(SFT, "{method: full}", "--hardware", "8xh200")
    assert "; full, float32 weights, micro-batch 2; about 8,700 tokens/s if a card reaches" in full


def test_length_that_fits_is_named_where_rank_does_not_help(plan: Any, pipeline: Path) -> None:
    recipe = Path("data_recipes/embedded.yaml").absolute()
    stage = SFT.replace("2048", "32768") + ", gradient_checkpointing: true"
    pipeline.write_text(CARDS.format(revision="0" * 40, recipe=recipe, stage=stage, tuning="{method: lora}"))
    code, _, err = plan(QWEN3_8B, "--hardware", "24gb")
    length = int(err.partition("--set stages.trained.max_length=")[2].partition(".")[0])
    assert code == 2 and err.rstrip().endswith("A smaller rank does not help.") and length % 32 == 0
    for tokens, result in ((length, 0), (length + 32, 2)):
        words = ["--set", f"stages.trained.max_length={tokens}"]
        assert plan(QWEN3_8B, "--hardware", "24gb", *words)[0] == result
