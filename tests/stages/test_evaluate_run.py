"""The evaluate stage end to end on two-layer models: files, numbers, going on from an earlier attempt."""

import gc
import json
import re
import shutil
from dataclasses import replace
from weakref import WeakSet

import pytest

from align.config.stages.evaluate import EvaluateConfig
from align.data.rows import assistant, read_rows, user, write_rows
from align.evaluation import evaluator
from align.evaluation import logprobs as passes
from align.evaluation.plan import make_plan
from align.inference.transformers import TransformersEngine
from align.models import loading
from align.models.reward import RewardModel
from align.pipeline.context import StageContext
from align.stages import evaluate
from align.store.artifacts import Artifact, Kind
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.judges import by_word
from tests.support.stages.evaluation_stage import PROMPTS, context, inputs

__all__ = ["context", "inputs"]  # fixtures


def test_everything_at_once_and_again_from_what_is_kept(context, monkeypatch):
    metrics = evaluate.run(context)
    text = (context.output / "scorecard.json").read_text(encoding="utf-8")
    card = json.loads(text)
    assert (card["reference"], card["base"], card["primary"]) == ("sft", "model", "variety")
    assert card["settings"]["prompts"] == metrics["prompts"] == PROMPTS  # the long one is left out
    assert set(card["metrics"]) == {"variety", "reward", "finished", "length", "kl", "kl_k3", "heldout_loss"}
    estimates = card["estimates"]
    # the same weights and the same randomness: same responses, no drift; other weights drift
    assert estimates["model"]["reward"] == estimates["sft"]["reward"]
    assert estimates["model"]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert estimates["sft"]["kl"]["value"] == 0
    assert estimates["ppo"]["kl"]["value"] > 0.1
    assert estimates["ppo"]["kl_k3"]["value"] > 0.1
    assert estimates["ppo"]["heldout_loss"]["n"] == PROMPTS
    (model,) = card["reward_models"]
    assert (model["pairs"], model["stage"], model["task"]) == (4, "reward", "pairs")
    assert metrics["reward_accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert metrics["tokens"] > 0
    samples = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert [len(samples), len(samples[0]["responses"]["ppo"])] == [PROMPTS, 2]
    first, second = samples[0]["responses"]["ppo"]
    assert set(second) == {"text", "tokens", "finished", "scores", "reward", "kl"}
    assert set(second["scores"]) == {"variety"}
    assert len(first["token_kl"]) == first["tokens"]
    assert sum(nats for _, nats in first["token_kl"]) == pytest.approx(first["kl"], abs=1e-2)
    warnings = [line for line in context.events.read_text().splitlines() if '"warning"' in line]
    assert len(warnings) == 2  # the long prompt and the long held-out row

    def no_engine(*arguments, **options):
        raise AssertionError("an engine was opened although every response is kept")

    monkeypatch.setattr("align.inference.engine.open_engine", no_engine)
    monkeypatch.setattr("align.models.loading.load_policy", no_engine)
    monkeypatch.setattr("align.models.reward.RewardModel", no_engine)
    evaluate.run(context)
    assert (context.output / "scorecard.json").read_text(encoding="utf-8") == text


def test_each_checkpoint_is_loaded_and_scored_once(context, inputs, monkeypatch):
    """The best of two samples of sft contains what sft answers itself, and model has the weights of sft."""
    policies = [replace(artifact, record={"key": "same"}) for artifact in inputs["policies"][:2]]
    policies.append(inputs["policies"][2])
    baselines = {"best": {"of": "sft", "best_of": 2}, "again": {"of": "ppo", "sample_seed": 1}}
    config = EvaluateConfig(
        **context.config.model_dump()
        | {"baselines": baselines, "tasks": {"read": {"task": "preference"}}, "samples_per_prompt": 1}
    )
    loaded = []
    load_policy = loading.load_policy
    monkeypatch.setattr(loading, "load_policy", lambda folder: loaded.append(folder) or load_policy(folder))
    read, scored = [], []
    response_logprobs, score_places = passes.response_logprobs, RewardModel.score_places

    def logprobs(model, prompts, responses, **options):
        read.append(
            [id(model), options["temperature"], list(zip(map(tuple, prompts), map(tuple, responses), strict=True))]
        )
        return response_logprobs(model, prompts, responses, **options)

    def score(model, rows, places):
        scored.append([tuple(row) for row in rows])
        return score_places(model, rows, places)

    monkeypatch.setattr(passes, "response_logprobs", logprobs)
    monkeypatch.setattr(RewardModel, "score_places", score)
    evaluate.run(replace(context, config=config, inputs=inputs | {"policies": policies, "reference": policies[1]}))
    assert loaded.count(policies[2].model) == 1
    assert loaded.count(policies[0].model) <= 2  # the engine starts on it, too
    # Two weights: the reference reads all systems in one call, ppo its own two.
    kl = [rows for _, _, rows in read if len(rows) % PROMPTS == 0 and len(rows) >= 2 * PROMPTS]
    assert [len(rows) // PROMPTS for rows in kl] == [1 + 3, 2]
    # One call for the best of two, one for what else there is of the prompt set, one for the pairs.
    answers = [row for rows in scored for row in rows]
    assert len(answers) == len(set(answers))
    card = read_card(context)
    assert card["estimates"]["model"]["kl"]["value"] == 0
    assert card["estimates"]["again"]["kl"]["value"] > 0.1


def test_systems_are_scored_in_groups_that_a_kill_does_not_lose(context, monkeypatch):
    monkeypatch.setattr(evaluator, "SCORED_TOGETHER", 4 * PROMPTS)  # two systems with two answers to each prompt
    scored = []
    score_places = RewardModel.score_places

    def score(model, rows, places):
        scored.append(len(rows))
        if len(scored) == 2:
            raise KeyboardInterrupt
        return score_places(model, rows, places)

    monkeypatch.setattr(RewardModel, "score_places", score)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(context)
    evaluate.run(context)
    # model and sft answer alike: one request each for the answers of both; then ppo, twice; then the pairs.
    assert scored[0] <= 2 * PROMPTS and scored[1] == scored[2] and len(scored) == 4


def read_card(context):
    return json.loads((context.output / "scorecard.json").read_text(encoding="utf-8"))


def test_pairs_with_flipped_labels_are_scored_again(context, inputs):
    """Ids of rows need not determine them: those of a sampled pair name its prompt and its place."""
    evaluate.run(context)
    rows = read_rows(inputs["pairs"].split("test"))
    before = read_card(context)["reward_models"][0]
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write_rows(inputs["pairs"].split("test"), flipped)
    evaluate.run(context)
    after = read_card(context)["reward_models"][0]
    assert after["margin"]["value"] == pytest.approx(-before["margin"]["value"]) and before["margin"]["value"] != 0
    assert after["as_labeled"]["value"] == 1 - before["as_labeled"]["value"]


@pytest.mark.parametrize(
    "changes", [{"completion": [assistant("zzzz")]}, {"completion_finished": False}], ids=["text", "cut off"]
)
def test_another_held_out_answer_under_the_same_id_is_read_anew(context, inputs, changes):
    evaluate.run(context)
    before = read_card(context)["estimates"]["ppo"]["heldout_loss"]["value"]
    rows = read_rows(inputs["heldout"].split("test"))
    write_rows(inputs["heldout"].split("test"), [row | changes for row in rows])
    evaluate.run(context)
    assert read_card(context)["estimates"]["ppo"]["heldout_loss"]["value"] != before


def change_a_number(text: str) -> str:
    """The text with the first of its fractions another one."""
    return re.sub(r"\d\.\d+", "9.75", text, count=1)


def test_a_changed_result_on_disk_is_computed_again(context):
    """Every file of the cache in turn: a number or a text is changed by hand, and the scorecard stays what it was."""
    evaluate.run(context)
    card, samples = ((context.output / name).read_text() for name in ("scorecard.json", "samples.jsonl"))
    files = [path for path in sorted(context.checkpoints.rglob("*.json*")) if path.is_file()]
    kinds = {path.name.split("-")[0] for path in files if path.parent == context.checkpoints}
    assert kinds == {"reward", "pairs", "kl", "heldout"}
    assert len(files) == 3 + 3 + 1 + 2 + 3  # responses, rewards, pairs, KL without the reference, held-out losses
    for path in files:
        changed = change_a_number(path.read_text()).replace('"text": "', '"text": "not this ')
        assert changed != path.read_text()
        path.write_text(changed)
    warnings = count_warnings(context)
    evaluate.run(context)
    assert (context.output / "scorecard.json").read_text() == card
    assert (context.output / "samples.jsonl").read_text() == samples
    assert count_warnings(context) - warnings == len(files) + 2


def count_warnings(context):
    return context.events.read_text().count('"warning"')


def test_an_empty_split_is_refused(refused, context, inputs):
    write_rows(inputs["prompts"].split("test"), [])
    refused(evaluate.run, context)


def test_greedy_leaves_kl_out(context, inputs):
    changes = {"temperature": 0.0, "samples_per_prompt": 1}
    changes |= dict.fromkeys(("reward", "pairs", "heldout", "score"))
    config = context.config.model_copy(update=changes)
    values = inputs | {"reward": None, "pairs": None, "heldout": None}
    evaluate.run(StageContext(**{**context.__dict__, "config": config, "inputs": values}))
    card = json.loads((context.output / "scorecard.json").read_text(encoding="utf-8"))
    assert set(card["metrics"]) == {"finished", "length"}
    assert card["reward_models"] == []


def test_responses_of_other_weights_are_noticed(refused, context, monkeypatch):
    """An engine that goes on with the first checkpoint's weights: what a failed hand-over looks like."""
    monkeypatch.setattr(TransformersEngine, "load_weights", lambda self, weights: None)
    refused(evaluate.run, context)


def test_an_engine_that_hangs_ends_the_stage(context, monkeypatch):
    def end(message):
        raise SystemExit(message)

    monkeypatch.setattr(TransformersEngine, "generate", lambda engine, *_, **__: engine.watchdog.on_hang("it hangs"))
    with pytest.raises(SystemExit, match="it hangs"):
        evaluate.run(replace(context, fail_at_once=end))


def test_prompting_best_of_n_and_a_gate(context, inputs, tmp_path, monkeypatch):
    """One prompt set through every kind of system, with the best of N kept by the reward model."""
    (tmp_path / "shots.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    monkeypatch.chdir(tmp_path)
    config = EvaluateConfig(
        **context.config.model_dump()
        | {
            "heldout": None,
            "samples_per_prompt": 1,
            "baselines": {
                "shown": {"of": "model", "system": "Say ok.", "shots": 1, "examples": "shots.jsonl"},
                "best": {"of": "sft", "best_of": 4},
            },
            "gates": {
                "variety": ">= sft + 2",
                "best/reward": ">= sft",
                "kl_to_sft": {"bound": "<= 0", "level": "warning"},
            },
        }
    )
    metrics = evaluate.run(replace(context, config=config, inputs=inputs | {"heldout": None}))
    card = json.loads((context.output / "scorecard.json").read_text(encoding="utf-8"))
    assert card["policies"] == ["model", "sft", "ppo", "shown", "best"]
    estimates = card["estimates"]
    assert estimates["best"]["reward"]["value"] > estimates["sft"]["reward"]["value"]
    assert estimates["best"]["kl"]["method"] == "upper bound"
    assert estimates["shown"]["kl"]["value"] > 0.1  # the same weights as the reference, but another prompt
    gates = {(gate["system"], gate["metric"]): gate["passed"] for gate in card["gates"]}
    assert gates == {("ppo", "variety"): False, ("best", "reward"): True, ("ppo", "kl"): False}
    assert len(metrics["failed_gates"]) == 1  # a warning fails nothing
    assert metrics["failed_gates"][0].startswith("variety of ppo is ")
    samples = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert [len(samples[0]["responses"][name]) for name in card["policies"]] == [1] * 5
    best = [sample["responses"]["best"][0]["reward"] for sample in samples]
    assert sum(best) / len(best) == pytest.approx(estimates["best"]["reward"]["value"])


def test_gate_that_nothing_measures_is_refused_before_the_run(refused, context, monkeypatch):
    monkeypatch.setattr("align.evaluation.evaluator.evaluate", lambda *values: pytest.fail("it ran"))
    greedy = {"gates": {"kl": "<= 3"}, "temperature": 0.0, "samples_per_prompt": 1}
    config = EvaluateConfig(**context.config.model_dump() | greedy)
    refused(lambda: evaluate.run(replace(context, config=config)))


def test_a_checkpoint_against_itself_shows_no_difference(context, inputs):
    """A/A through the whole stage: the same weights under other seeds, twenty times."""
    rows = [
        {"id": str(i), "source": "words", "checks": "", "prompt": [user("say " + "x" * i)],
         "completion": [assistant("ok")]}
        for i in range(24)
    ]  # fmt: skip
    write_rows(inputs["prompts"].split("test"), rows)
    config = EvaluateConfig(
        policies=["sft"],
        reference="sft",
        prompts="data",
        score=context.config.score,
        max_tokens=6,
        precision="float32",
        bootstrap=400,
        baselines={f"again{seed}": {"of": "sft", "sample_seed": seed} for seed in range(20)},
    )
    values = dict.fromkeys(inputs) | {name: inputs[name] for name in ("reference", "prompts")}
    evaluate.run(replace(context, config=config, inputs=values | {"policies": [inputs["reference"]]}))
    card = json.loads((context.output / "scorecard.json").read_text(encoding="utf-8"))
    variety = [row for row in card["differences"] if row["metric"] == "variety"]
    assert len(variety) == 20
    assert len({row["value"] for row in variety}) > 10  # other answers each time
    # 95 % intervals: 16 or fewer of 20 cover zero in 1.6 % of such experiments, and this one is fixed by its seeds
    assert sum(row["low"] <= 0 <= row["high"] for row in variety) >= 17
    assert {row["verdict"] for row in card["differences"]} == {"unclear"}


def test_greedy_checkpoint_gives_no_measure_of_noise(context, inputs):
    baselines = {"again": {"of": "sft", "sample_seed": 1}, "other": {"of": "ppo", "sample_seed": 1}}
    config = EvaluateConfig(
        policies=["sft", "ppo"], reference="sft", prompts="data", score=context.config.score, max_tokens=6,
        temperature=0.0, precision="float32", bootstrap=200, baselines=baselines,
    )  # fmt: skip
    values = dict.fromkeys(inputs) | {name: inputs[name] for name in ("reference", "prompts")}
    evaluate.run(replace(context, config=config, inputs=values | {"policies": inputs["policies"][1:]}))
    card = read_card(context)
    assert card["copies"] == {"again": ["prompts"], "other": ["prompts"]}
    compared = {(row["policy"], row["against"]) for row in card["differences"]}
    assert compared == {("ppo", "sft"), ("other", "sft")}
    noise = [flag["text"] for flag in card["flags"] if flag["kind"] == "noise"]
    assert len(noise) == 2
    assert noise[0].startswith("again repeats sft word for word in prompts, so the noise was not measured")


def test_examples_come_from_many_sources_of_the_train_split(refused, context, inputs):
    rows = [
        {"id": str(i), "source": "common" if i < 8 else f"rare{i}", "checks": "", "prompt": [user(f"q{i}")],
         "completion": [assistant(f"a{i}")]}
        for i in range(10)
    ]  # fmt: skip
    write_rows(inputs["prompts"].split("train"), rows)
    shown = {"shown": {"of": "model", "shots": 3}}
    config = EvaluateConfig(**context.config.model_dump() | {"baselines": shown, "max_prompt_tokens": 300})
    plan = make_plan(replace(context, config=config))
    text = plan.systems[0].policy.tokenizer.decode(plan.prompts["shown"][0])
    assert [text.count(word) for word in ("q8", "a8", "q9", "a9")] == [1, 1, 1, 1]  # one of each source first
    assert len(plan.prompts["shown"][0]) > len(plan.prompts["model"][0])
    write_rows(inputs["prompts"].split("train"), rows[:2])
    refused(lambda: make_plan(replace(context, config=config)))


@pytest.mark.parametrize("task", ["preference", "chat"])
def test_conversation_without_examples_is_refused_before_the_run(refused, context, inputs, tmp_path, task):
    (tmp_path / "q.jsonl").write_text('{"question": "2 + 2", "choices": ["3", "4"], "answer": 1}\n')
    blocks = {
        "preference": {"task": "preference"},
        "chat": {"task": "multiple_choice", "format": "generic", "chat": True, "files": [str(tmp_path / "q.jsonl")]},
    }
    changes = {"tasks": {"mine": blocks[task]}, "baselines": {"shown": {"of": "model", "shots": 2}}, "prompts": None}
    config = EvaluateConfig(**context.config.model_dump() | changes | {"score": None})
    refused(lambda: make_plan(replace(context, config=config, inputs=inputs | {"prompts": None})))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_heldout_length": 2},
        {
            "tasks": {
                "house": {
                    "task": "judged", "mode": "compare", "against": "base", "files": ["questions.jsonl"],
                    "judge": {"reward": True},
                }
            },
            "policies": ["sft", "ppo"],
        },
        {
            "tasks": {"words": {"task": "perplexity", "texts": "books", "max_length": 20}},
            "texts": ["books"],
            "baselines": {"shown": {"of": "model", "system": "x" * 20}},
        },
    ],
    ids=["held-out", "base", "prompt"],
)  # fmt: skip
def test_unreadable_or_incomparable_inputs_are_refused(refused, context, inputs, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    books = Artifact("books", Kind.TEXTS, tmp_path / "books", {"key": "books-key"})
    books.path.mkdir()
    for split in ("train", "test"):
        write_rows(books.split(split), [{"id": "1", "source": "t", "text": "abc"}])
    config = EvaluateConfig(**context.config.model_dump() | changes)
    policies = [artifact for artifact in inputs["policies"] if artifact.stage in config.policies]
    values = inputs | {"policies": policies, "texts": [books]}
    refused(lambda: make_plan(replace(context, config=config, inputs=values)))


def test_a_list_of_rewards_is_a_metric_each_beside_their_sum(context, inputs):
    score = [
        {"function": "tests.support.rewards:length", "arguments": {"limit": 10}},
        {"function": "tests.support.rewards:vowels", "weight": -2.0, "name": "open"},
    ]
    config = EvaluateConfig(
        policies=["sft", "ppo"], reference="sft", prompts="data", score=score, max_tokens=6,
        max_prompt_tokens=100, gates={"score_open": "<= 1"}, metrics=[score[0] | {"name": "brevity"}],
    )  # fmt: skip
    artifacts = {"policies": inputs["policies"][1:], "reference": inputs["policies"][1], "prompts": inputs["prompts"]}
    listed = replace(context, config=config, inputs=artifacts)
    evaluate.run(listed)
    card = read_card(listed)
    metrics = card["metrics"]
    assert metrics["score"]["meaning"] == "weighted sum: 1 x length + -2 x open"
    assert card["primary"] == "score"
    assert metrics["score_length"]["better"] == "higher" and metrics["score_open"]["better"] == "lower"
    # Some response has no vowel, so the metric that those lack is left out.
    assert "score_open_characters" in metrics and "score_open_vowels" not in metrics
    estimates = card["estimates"]["ppo"]
    assert estimates["brevity"] == estimates["score_length"]  # by the same function with the same arguments
    total = estimates["score_length"]["value"] - 2 * estimates["score_open"]["value"]
    assert estimates["score"]["value"] == pytest.approx(total)
    assert card["gates"][0]["metric"] == "score_open"
    samples = [json.loads(line) for line in (listed.output / "samples.jsonl").read_text().splitlines()]
    first = samples[0]["responses"]["ppo"][0]["scores"]
    assert first["score"] == pytest.approx(first["score_length"] - 2 * first["score_open"])


def test_reward_models_are_freed_before_the_next_load(context, inputs, monkeypatch):
    alive: WeakSet[RewardModel] = WeakSet()
    held: dict[str, list[list[str]]] = {}
    init, load_policy, score_responses = RewardModel.__init__, loading.load_policy, evaluator.score_responses

    def note(event):
        gc.collect()
        held.setdefault(event, []).append(sorted(model.folder for model in alive))

    def remember(model, folder, *arguments, **options):
        note("reward")
        model.folder = folder.parent.name
        alive.add(model)
        init(model, folder, *arguments, **options)

    def load(folder):
        note("policy")
        return load_policy(folder)

    def score(*arguments):
        note("list")
        return score_responses(*arguments)

    monkeypatch.setattr(RewardModel, "__init__", remember)
    monkeypatch.setattr(loading, "load_policy", load)
    monkeypatch.setattr(evaluator, "score_responses", score)
    changes = {"score": [{"reward": "listed"}], "baselines": {"best": {"of": "sft", "best_of": 2}}}
    config = EvaluateConfig(**context.config.model_dump() | changes)
    listed = replace(inputs["reward"], stage="listed", path=context.output.parent / "listed")
    shutil.copytree(inputs["reward"].path, listed.path)
    evaluate.run(replace(context, config=config, inputs=inputs | {"score.reward": [listed]}))
    # The stage's own model is gone when the list's is loaded; every system is then scored by one load of it.
    assert held["reward"] == [[], []]
    assert held["list"] == [[], ["listed"], ["listed"], ["listed"]]
    assert held["policy"] and not any(held["policy"])


def test_judge_among_rewards_counts_requests_and_quotes_columns(context, inputs):
    fake = FakeChat(lambda body: completion("[[7]]"))
    judge = {"endpoint": {"url": fake.url, "model": "m"}, "rubric": "The source is {row[source]}."}
    config = EvaluateConfig(
        policies=["sft"], reference="sft", prompts="data", score=[{"judge": judge}], max_tokens=6, max_prompt_tokens=100
    )
    artifacts = {"policies": inputs["policies"][1:2], "reference": inputs["policies"][1], "prompts": inputs["prompts"]}
    metrics = evaluate.run(replace(context, config=config, inputs=artifacts))
    fake.stop()
    assert metrics["values"]["sft"]["score_judge"] == pytest.approx(6 / 9)
    assert metrics["judges"]["judge"]["requests"] == len(fake.bodies) > 1
    assert any("The source is words." in prompt for prompt in fake.prompts())


def test_checkpoints_judge_the_answers_of_reward_bench_2(context, inputs, tmp_path):
    bad = ["no", "never", "not at all"]
    records = [
        {"id": str(number), "prompt": "Why?", "chosen": ["yes"], "rejected": bad, "subset": subset}
        for number, subset in enumerate(["Math", "Safety"])
    ]
    path = tmp_path / "rb2.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {"task": "reward_bench_2", "files": [str(path)], "max_tokens": 4}
    tasks = {"rank": task, "rate": {**task, "mode": "ratings"}}
    config = EvaluateConfig(policies=["sft"], reference="sft", tasks=tasks)
    artifacts = {"policies": inputs["policies"][1:2], "reference": inputs["policies"][1]}
    stage = replace(context, config=config, inputs=artifacts)
    metrics = evaluate.run(stage)
    # A model with random weights writes no verdict, which is chance in both modes.
    assert metrics["values"]["sft"] == {"rank.accuracy": 0.25, "rate.accuracy": 0.25}
    card = json.loads((stage.output / "scorecard.json").read_text(encoding="utf-8"))
    notes = {name: task["notes"]["sft"] for name, task in card["tasks"].items()}
    assert notes["rank"]["unreadable"] == 2 and notes["rate"]["unreadable"] == 8
    assert notes["rate"]["subsets"] == {"Math": 0.25, "Safety": 0.25}


def test_criteria_are_metrics_with_the_reasons_of_the_judge(context, inputs):
    fake = FakeChat(by_word)
    criteria = [{"criterion": "It has an e", "name": "vowel"}, {"criterion": "It has an x", "weight": -1}]
    judged = {"criteria": criteria, "judge": {"endpoint": {"url": fake.url, "model": "m"}}}
    config = EvaluateConfig(
        policies=["sft"],
        reference="sft",
        prompts="data",
        score=[judged],
        metrics=[judged | {"name": "rubric"}],
        max_tokens=6,
        max_prompt_tokens=100,
    )
    artifacts = {"policies": inputs["policies"][1:2], "reference": inputs["policies"][1], "prompts": inputs["prompts"]}
    stage = replace(context, config=config, inputs=artifacts)
    metrics = evaluate.run(stage)
    fake.stop()
    values = metrics["values"]["sft"]
    # The reward and the metric are one implementation, and share the judge's answers.
    assert values["rubric"] == values["score_criteria"] == values["score"]
    assert values["rubric_vowel"] == values["score_criteria_vowel"]
    assert metrics["judges"]["criteria"]["requests"] == len(fake.bodies) - metrics["judges"]["rubric"]["requests"]
    lines = [json.loads(line) for line in (stage.output / "samples.jsonl").read_text().splitlines()]
    sample = next(line["responses"]["sft"][0] for line in lines if line["responses"]["sft"][0]["text"].strip())
    assert [item["satisfied"] for item in sample["explanation"]["rubric"]] == [
        "e" in sample["text"],
        "x" in sample["text"],
    ]
    assert sample["explanation"]["criteria"][0]["reason"] == "About: It has an e"


def test_thoughts_are_closed_counted_and_not_scored(context, inputs, tmp_path, tiny_model):
    folder = tmp_path / "thinker"
    model = shutil.copytree(tiny_model, folder / "model")
    tokenizer = loading.load_tokenizer(model)
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    tokenizer.save_pretrained(model)
    thinker = Artifact("thinker", Kind.POLICY, folder, {"key": "thinker"})
    names = {"policies": ["thinker"], "reference": "thinker", "max_tokens": 24, "thinking_budget": 4}
    config = context.config.model_copy(update=names | dict.fromkeys(("reward", "pairs", "heldout")))
    values = {"policies": [thinker], "reference": thinker, "reward": None, "pairs": None, "heldout": None}
    evaluate.run(replace(context, config=config, inputs=inputs | values))
    card = json.loads((context.output / "scorecard.json").read_text(encoding="utf-8"))
    assert card["settings"]["sampling"]["thinking_budget"] == 4
    estimates = card["estimates"]["thinker"]
    # Of 24 tokens, 4 and the 11 that close a thought are thought, unless the turn ended before.
    assert estimates["thought_length"]["value"] > 11 and estimates["open_thoughts"]["value"] < 0.3
    assert estimates["length"]["value"] + estimates["thought_length"]["value"] <= 24
    for line in (context.output / "samples.jsonl").read_text().splitlines():
        for sample in json.loads(line)["responses"]["thinker"]:
            answer = sample["text"][sample["thought_end"] :]
            assert sample["scores"]["variety"] == min(1.0, len(set(answer)) / 9)
            assert sample["open_thought"] == (answer == "" and not sample["text"].rstrip().endswith("</think>"))
