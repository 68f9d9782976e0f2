"""Stage distill, end to end on tiny models: the student nears its teacher, on answers of the data and its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from align.config.stages.sft import DistillConfig
from align.inference.protocol import Response, Sampling
from align.models.built_in import make_tiny
from align.models.fast.token_logprobs import LogitTransform
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.context import StageContext
from align.stages import distill as work
from align.stages.distill import run
from align.store.rollouts import ROLLOUTS, is_kept, open_rollouts, rollout_rows
from align.training.distill_trainer import AnswerCollator, Teacher, TeacherCache, is_on_policy_step, prompt_of
from align.training.divergence import Live, Measure, TopTokens, summed_divergence, with_rest
from align.training.rows import MASKED, encode_supervised
from tests.support.models.scaled_logits import make_scaling_model
from tests.support.refusals import Refused
from tests.support.stages.more_tokens import add_token
from tests.support.stages.stage_contexts import distill_stage
from tests.support.training.harness import losses, rows
from tests.support.training.killed_stage import Killed, dying


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and deeper than the student, and of other weights."""
    return make_tiny(tmp_path_factory.mktemp("teacher") / "model", seed=5, hidden_size=96, layers=3)


@pytest.mark.parametrize(
    "fields",
    [
        {"divergence": "forward", "top_k": 16},
        {"divergence": "reverse", "top_k": None, "tuning": {"method": "lora", "rank": 8}},
        {"divergence": "jsd", "top_k": None, "on_policy": 0.5, "max_tokens": 8},
    ],
    ids=["forward", "reverse-lora", "jsd-own"],
)
def test_the_student_comes_nearer(fields: dict[str, Any], tiny_model: Path, teacher: Path, tmp_path: Path) -> None:
    stage = distill_stage(tmp_path / "run", tiny_model, teacher, epochs=6, **fields)
    metrics = run(stage)
    assert metrics["test_divergence_after"] < 0.7 * metrics["test_divergence_before"]
    assert metrics["steps"] == 18
    on_policy_steps = sum(is_on_policy_step(stage.seed, step, fields.get("on_policy", 0.0)) for step in range(18))
    assert metrics.get("own_steps", 0) == on_policy_steps
    # The saved student, read back, is as near to the teacher as the trained one was.
    test = encode_supervised(load_tokenizer(tiny_model), rows(8, start=24), 64)
    measure = Measure(fields["divergence"], top_k=fields["top_k"])
    student, model = load_policy(stage.output / "model"), load_policy(teacher)
    apart, tokens = 0.0, 0
    for row in test.rows:
        ids, answer_tokens = (
            torch.tensor([row["input_ids"]]),
            torch.tensor([label != MASKED for label in row["labels"][1:]]),
        )
        with torch.no_grad():
            states = student.model(ids).last_hidden_state[0, :-1][answer_tokens]
            live = Live(model.model(ids).last_hidden_state[0, :-1][answer_tokens], model.lm_head)
            apart += float(summed_divergence(measure, states, student.lm_head, live))
        tokens += len(states)
    assert apart / tokens == pytest.approx(metrics["test_divergence_after"], rel=1e-3)


def test_the_loss_is_trls_generalized_jsd() -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    for measure, beta in ((Measure("forward", 0.5, 2.0), 0), (Measure("reverse", 0.5, 2.0), 1),
                          (Measure("jsd", 0.3, 2.0), 0.3)):  # fmt: skip
        theirs = gkd.generalized_jsd_loss(student[None], teacher[None], beta=beta, temperature=2.0, reduction="sum")
        ours = summed_divergence(measure, student, torch.nn.Identity(), Live(teacher, torch.nn.Identity()))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_divergences_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    # KL(p || q) = 0.5 log 2 + 0.5 log (2/3) = 0.143841; KL(q || p) = 0.25 log 0.5 + 0.75 log 1.5 = 0.130812
    assert float(Measure("forward").of(q, p)) == pytest.approx(0.143841, abs=1e-6)
    assert float(Measure("reverse").of(q, p)) == pytest.approx(0.130812, abs=1e-6)
    # The mixture is (0.375, 0.625): 0.5 KL(p || m) + 0.5 KL(q || m) = 0.5 (0.032269 + 0.035361)
    assert float(Measure("jsd").of(q, p)) == pytest.approx(0.033821, abs=1e-5)


def test_a_few_tokens_of_the_teacher_bound_the_whole_from_below() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(7, 20), torch.randn(7, 20)
    identity = torch.nn.Identity()
    full, some, most = (
        float(summed_divergence(Measure(top_k=k), student, identity, Live(teacher, identity))) for k in (None, 4, 19)
    )
    assert 0 < some < full
    assert most == pytest.approx(full, rel=1e-4)  # 19 of 20 and the rest are all 20
    best = torch.log_softmax(teacher, dim=-1).topk(4, dim=-1)
    top_tokens = TopTokens(best.indices, best.values)
    assert float(summed_divergence(Measure(top_k=4), student, identity, top_tokens)) == pytest.approx(some, rel=1e-6)
    assert float(with_rest(best.values).exp().sum()) == pytest.approx(7, rel=1e-6)
    same = torch.randn(3, 20)
    assert float(summed_divergence(Measure(top_k=4), same, identity, Live(same, identity))) == pytest.approx(
        0, abs=1e-5
    )


def test_heads_of_unlike_size_are_compared_where_they_meet() -> None:
    torch.manual_seed(2)
    logits, identity = torch.randn(4, 9), torch.nn.Identity()
    padded = torch.cat([logits, torch.full((4, 3), 5.0)], dim=1)
    assert float(summed_divergence(Measure(), logits, identity, Live(padded, identity))) == pytest.approx(0, abs=1e-5)
    assert float(summed_divergence(Measure(), padded, identity, Live(logits, identity))) == pytest.approx(0, abs=1e-5)


def test_soft_caps_are_those_of_each_model() -> None:
    torch.manual_seed(6)
    student, teacher = 4 * torch.randn(5, 11), 4 * torch.randn(5, 11)
    identity = torch.nn.Identity()
    divergence = summed_divergence(
        Measure(temperature=2.0),
        student,
        identity,
        Live(teacher, identity, LogitTransform(cap=3.0)),
        LogitTransform(cap=5.0),
    )
    capped_student, capped_teacher = 5 * torch.tanh(student / 5), 3 * torch.tanh(teacher / 3)
    expected = summed_divergence(Measure(temperature=2.0), capped_student, identity, Live(capped_teacher, identity))
    assert float(divergence) == pytest.approx(float(expected), rel=1e-6)


def test_a_teachers_own_scale_of_its_logits_counts(tmp_path: Path) -> None:
    model = load_policy(make_scaling_model(tmp_path))
    ids = torch.arange(40, 50)
    row = {"input_ids": ids.tolist(), "labels": [MASKED] * 4 + ids[4:].tolist(), "row": 0}
    with torch.no_grad():
        expected = model(ids[None]).logits[0, 3:-1].log_softmax(-1).topk(5).values
    (top_tokens,) = Teacher(model, bfloat16=False).find_top_tokens(
        [row], AnswerCollator(pad=0), Measure(top_k=5), 260, lambda done, total: None
    )
    assert torch.allclose(top_tokens.logprobs, expected, atol=1e-5)


def test_the_gradient_is_that_of_the_whole_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    teacher, identity = torch.randn(10, 6), torch.nn.Identity()
    gradients = []
    for chunk in (256, 3):
        monkeypatch.setattr("align.training.divergence.CHUNK", chunk)
        student = torch.randn(10, 6, generator=torch.Generator().manual_seed(4), requires_grad=True)
        summed_divergence(Measure("reverse"), student, identity, Live(teacher, identity)).backward()
        assert student.grad is not None
        gradients.append(student.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_the_teachers_word_is_computed_once(
    tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(distill_stage(tmp_path / "one", tiny_model, teacher, max_steps=1))
    assert (first["teacher_rows_cached"], first["teacher_rows_computed"]) == (0, 32)
    monkeypatch.setattr(work, "load_policy", lambda *fields: pytest.fail("the teacher was loaded"))
    second = run(
        distill_stage(tmp_path / "two", tiny_model, teacher, max_steps=1, learning_rate=1e-3, divergence="reverse")
    )
    assert (second["teacher_rows_cached"], second["teacher_rows_computed"]) == (32, 0)
    for name, fields in (("warmer", {"temperature": 2.0}), ("fewer", {"top_k": 8}), ("low", {"precision": "bfloat16"})):
        with pytest.raises(pytest.fail.Exception, match="the teacher was loaded"):
            run(distill_stage(tmp_path / name, tiny_model, teacher, max_steps=1, **fields))
    other_teacher = make_tiny(tmp_path / "other" / "model", seed=6)
    with pytest.raises(pytest.fail.Exception, match="the teacher was loaded"):
        run(distill_stage(tmp_path / "another", tiny_model, other_teacher, max_steps=1))


def test_the_teacher_reads_no_padding_and_shared_prefixes_once(
    tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = work.load_policy
    read: list[int] = []

    def load_counted(*arguments: Any) -> Any:
        model = load(*arguments)
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
        return model

    monkeypatch.setattr(work, "load_policy", load_counted)
    metrics, tokens = {}, {}
    for shared in (False, True):
        stage = distill_stage(tmp_path / str(shared), tiny_model, teacher, max_steps=1)
        runtime = stage.runtime.model_copy(update={"shared_prefixes": shared})
        metrics[shared] = run(replace(stage, runtime=runtime))
        tokens[shared] = sum(read)
        read.clear()
    # 48 and 80 tokens are read where the one line is checked against padded rows.
    assert tokens[True] - 128 < 0.8 * tokens[False]
    assert metrics[True]["teacher_rows_computed"] == 32  # no row of a teacher that read otherwise
    for name in ("test_divergence_before", "test_loss_before"):
        assert metrics[True][name] == pytest.approx(metrics[False][name], rel=1e-4)


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, {"teacher": "t"})
    encoded = [{"input_ids": [1, 2, 3], "labels": [MASKED, 2, 3]}]
    word = [TopTokens(torch.tensor([[4], [5]], dtype=torch.int32), torch.tensor([[-1.0], [-2.0]]))]
    assert cache.load(encoded, lambda: word)[0].ids.tolist() == [[4], [5]]
    (file,) = tmp_path.glob("*.safetensors")
    assert cache.load(encoded, lambda: pytest.fail("computed"))[0].logprobs.tolist() == [[-1.0], [-2.0]]
    file.write_bytes(file.read_bytes()[:-4])
    assert cache.load(encoded, lambda: word)[0].ids.tolist() == [[4], [5]]
    assert (cache.hits, cache.computed) == (1, 2)


def test_a_changed_number_is_computed_again(tmp_path: Path) -> None:
    warnings: list[str] = []
    cache = TeacherCache(tmp_path, {"teacher": "t"}, warnings.append)
    encoded = [{"input_ids": [1, 2, 3], "labels": [MASKED, 2, 3]}]
    word = [TopTokens(torch.tensor([[4], [5]], dtype=torch.int32), torch.tensor([[-1.0], [-2.0]]))]
    cache.load(encoded, lambda: word)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        header = tensors.metadata()
    save_file({**load_file(file), "ids": torch.tensor([[4], [9]], dtype=torch.int32)}, file, header)
    assert cache.load(encoded, lambda: word)[0].ids.tolist() == [[4], [5]]
    assert len(warnings) == 1 and file.name in warnings[0]


def test_a_cache_tells_apart_which_tokens_are_learned(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, {"teacher": "t"})
    word = [TopTokens(torch.tensor([[4]], dtype=torch.int32), torch.tensor([[-1.0]]))]
    for labels in ([MASKED, 2, MASKED], [MASKED, MASKED, 3]):  # as many
        cache.load([{"input_ids": [1, 2, 3], "labels": labels}], lambda: word)
    assert (cache.hits, cache.computed) == (0, 2)


def test_a_resumed_run_equals_the_uninterrupted_one(tiny_model: Path, teacher: Path, tmp_path: Path) -> None:
    def stage(name: str) -> StageContext:
        fields = {"epochs": 2, "save_steps": 2, "on_policy": 0.5, "max_tokens": 6, "tuning": {"method": "lora"}}
        return distill_stage(tmp_path / name, tiny_model, teacher, **fields)

    uninterrupted, parts = stage("whole"), stage("parts")
    on_policy_steps = [step for step in range(6) if is_on_policy_step(uninterrupted.seed, step, 0.5)]
    assert on_policy_steps
    assert on_policy_steps[-1] >= 4  # a step after the checkpoint samples too
    run(uninterrupted)
    with pytest.raises(Killed):
        run(dying(parts, 5))
    assert run(parts)["resumed_from_step"] == 4
    assert losses(parts) == losses(uninterrupted)
    expected, resumed = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[name].equal(resumed[name]) for name in expected)
    # Both stored the answers of each step once; the killed run had stored the step that it repeated.
    first, second = (list(rollout_rows(open_rollouts(c.output / ROLLOUTS))) for c in (uninterrupted, parts))
    assert first == second
    assert [row["update"] - 1 for row in first] == [step for step in on_policy_steps for _ in range(8)]
    data = {row["prompt_id"]: row for row in first}
    assert {json.dumps(row["prompt"]) for row in rows(24)} >= {json.dumps(row["prompt"]) for row in data.values()}
    tokenizer = load_tokenizer(tiny_model)
    for row in first:
        assert len(row["token_ids"]) == row["tokens"] == len(row["sampler_logprobs"]) <= 6
        assert tokenizer.decode(row["token_ids"], skip_special_tokens=True) == row["response"]
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert (row["prompt_ids"], row["learned"], row["score"]) == (asked, True, None)


def test_stored_answers_are_limited(tiny_model: Path, teacher: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_steps": 2, "on_policy": 1.0, "max_tokens": 4}
    stage = distill_stage(tmp_path / "none", tiny_model, teacher, **fields, rollouts={"keep": 0})
    run(stage)
    assert not (stage.output / ROLLOUTS).exists()
    stage = distill_stage(tmp_path / "half", tiny_model, teacher, **fields, rollouts={"keep": 0.5})
    run(stage)
    names = {row["prompt_id"] for row in rollout_rows(open_rollouts(stage.output / ROLLOUTS))}
    assert names and all(is_kept(name, 0.5) for name in names)


def test_own_answers_follow_the_datas_prompts(
    tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled_prompts: list[list[int]] = []

    def sampler(context: StageContext, engine: Any, tokenizer: Any) -> Any:
        def sample(model: Any, prompts: list[list[int]], step: int) -> list[Response]:
            sampled_prompts.extend(prompts)
            return [Response([40, 41, 2], [0.0] * 3, True, "") for _ in prompts]

        return sample

    monkeypatch.setattr(work, "_sampler", sampler)
    stage = distill_stage(
        tmp_path / "run", tiny_model, teacher, max_steps=2, on_policy=1.0, sft_weight=9.0, max_tokens=4
    )
    assert run(stage)["own_steps"] == 2
    encoded = encode_supervised(load_tokenizer(tiny_model), rows(24), 64)
    prompts = {tuple(prompt_of(row["input_ids"], row["labels"])) for row in encoded.rows}
    assert len(sampled_prompts) == 16
    assert {tuple(prompt) for prompt in sampled_prompts} <= prompts
    # The student's tokens alone count: neither the prompts', nor the data's answers with their weight.
    answered = [{"input_ids": [*p, 40, 41, 2], "labels": [MASKED] * len(p) + [40, 41, 2]} for p in sampled_prompts[:8]]
    apart, _, tokens = by_hand(tiny_model, teacher, answered)
    assert tokens == 8 * 3
    assert losses(stage)[1] == pytest.approx(apart / tokens, rel=1e-4)


def test_forced_ends_of_thoughts_are_not_learned(
    refused: Refused, tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = "('<think>\\n' if message['role'] == 'assistant' else '') + message['content']"
    student = Path(shutil.copytree(tiny_model, tmp_path / "student"))
    thinker = Path(shutil.copytree(teacher, tmp_path / "thinker"))
    for model in (student, thinker):
        tokenizer = load_tokenizer(model)
        template = tokenizer.chat_template.replace("message['content']", opened)
        tokenizer.chat_template = template.replace("assistant\\n'", "assistant\\n<think>\\n'")
        tokenizer.save_pretrained(model)
    fields: dict[str, Any] = {"max_steps": 1, "on_policy": 1.0, "max_tokens": 24, "max_length": 128}
    refused(lambda: run(distill_stage(tmp_path / "refused", student, thinker, thinking_budget=13, **fields)))
    sampled: list[tuple[list[int], Response]] = []
    generate = work.generate

    def watch(engine: Any, reader: Any, prompts: list[list[int]], sampling: Sampling) -> list[list[Response]]:
        responses = generate(engine, reader, prompts, sampling)
        sampled.extend((prompt, row[0]) for prompt, row in zip(prompts, responses, strict=True))
        return responses

    monkeypatch.setattr(work, "generate", watch)
    stage = distill_stage(tmp_path / "run", student, thinker, thinking_budget=4, **fields)
    run(stage)
    # A random model rarely closes a thought within four tokens; eleven tokens close it.
    assert {len(response.forced) for _, response in sampled} >= {11}
    answered = []
    for prompt, response in sampled:
        learned = [token not in response.forced for token in range(len(response.token_ids))]
        labels = [0 if is_learned else MASKED for is_learned in learned]
        answered.append({"input_ids": prompt + response.token_ids, "labels": [MASKED] * len(prompt) + labels})
    apart, _, tokens = by_hand(student, thinker, answered)
    assert losses(stage)[1] == pytest.approx(apart / tokens, rel=1e-4)


def by_hand(student: Path, teacher: Path, encoded_rows: list[dict[str, Any]]) -> tuple[float, float, int]:
    """Divergence (forward, 64 tokens) and negative log-likelihood, summed over the labeled tokens, and how many."""
    student_model, teacher_model = load_policy(student), load_policy(teacher)
    apart, nll, tokens = 0.0, 0.0, 0
    for row in encoded_rows:
        ids, answer_tokens = (
            torch.tensor([row["input_ids"]]),
            torch.tensor([label != MASKED for label in row["labels"][1:]]),
        )
        with torch.no_grad():
            states = student_model.model(ids).last_hidden_state[0, :-1][answer_tokens]
            live = Live(teacher_model.model(ids).last_hidden_state[0, :-1][answer_tokens], teacher_model.lm_head)
            apart += float(summed_divergence(Measure(top_k=64), states, student_model.lm_head, live))
            nll += float(
                torch.nn.functional.cross_entropy(
                    student_model.lm_head(states), ids[0, 1:][answer_tokens], reduction="sum"
                )
            )
        tokens += len(states)
    return apart, nll, tokens


def test_sft_weight_adds_the_loss_on_the_data(tiny_model: Path, teacher: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_steps": 1, "batch_size": 24, "micro_batch_size": 8, "sft_weight": 0.5}
    stage = distill_stage(tmp_path / "run", tiny_model, teacher, **fields)
    run(stage)
    apart, nll, tokens = by_hand(tiny_model, teacher, encode_supervised(load_tokenizer(tiny_model), rows(24), 64).rows)
    assert losses(stage)[1] == pytest.approx((apart + 0.5 * nll) / tokens, rel=1e-4)


class Asked:
    """An engine that writes down what it is asked, in order."""

    name = "asked"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def load_weights(self, weights: Any) -> None:
        self.calls.append({name: tensor.clone() for name, tensor in weights})

    def generate(self, prompts: list[list[int]], sampling: Sampling, on_progress: Any = None) -> list[list[Response]]:
        self.calls.append(sampling)
        return [[Response([40, 2], [0.0, 0.0], True, "")] for _ in prompts]

    def close(self) -> None:
        pass


def test_each_step_samples_anew_from_the_student_as_it_is(
    tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Asked()
    monkeypatch.setattr(work, "open_engine", lambda *loaded_weights, **options: engine)
    fields: dict[str, Any] = {
        "temperature": 2.0,
        "sample_temperature": 0.7,
        "max_tokens": 4,
        "max_steps": 3,
        "on_policy": 1.0,
    }
    run(distill_stage(tmp_path / "run", tiny_model, teacher, **fields))
    loaded_weights, samplings = engine.calls[::2], engine.calls[1::2]
    start = load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert loaded_weights[0][name].equal(start[name])
    assert not loaded_weights[2][name].equal(start[name])  # the first step warms up, at a rate of 0
    assert [(sampling.temperature, sampling.max_tokens) for sampling in samplings] == 3 * [(0.7, 4)]
    assert len({sampling.seed for sampling in samplings}) == 3


def test_steps_of_own_answers_follow_seed_and_step() -> None:
    steps = [is_on_policy_step(7, step, 0.3) for step in range(2000)]
    assert sum(steps) / 2000 == pytest.approx(0.3, abs=0.04)
    assert (
        steps
        == [is_on_policy_step(7, step, 0.3) for step in range(2000)]
        != [is_on_policy_step(8, s, 0.3) for s in range(2000)]
    )
    assert not any(is_on_policy_step(7, step, 0.0) for step in range(9))
    assert all(is_on_policy_step(7, step, 1.0) for step in range(9))


def test_a_batch_of_answers() -> None:
    batch = AnswerCollator(9)([
        {"input_ids": [1, 2, 3], "labels": [MASKED, 2, 3], "row": 4}, {"input_ids": [5], "labels": [5]},
    ])  # fmt: skip
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 9, 9]]
    assert batch["labels"].tolist() == [[MASKED, 2, 3], [5, MASKED, MASKED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["row"].tolist() == [4, -1]


def test_teachers_that_cannot_teach_are_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    other_teacher = make_tiny(tmp_path / "template", seed=1)
    (other_teacher / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    refused(lambda: run(distill_stage(tmp_path / "a", tiny_model, other_teacher)))
    more = make_tiny(tmp_path / "vocabulary", seed=1)
    add_token(more, "zebra")
    refused(lambda: run(distill_stage(tmp_path / "b", tiny_model, more)))


@pytest.mark.parametrize(
    "fields",
    [
        {"teacher": "model"},
        {"on_policy": 0.5, "tuning": {"method": "prefix"}},
        {"on_policy": 0.5, "max_tokens": 64},
        {"divergance": "jsd"},
        {"jsd_beta": 0.1},
        {"max_tokens": 32},
        {"sample_temperature": 0.7},
        {"rollouts": {"keep": 0.5}},
        {"trainer": {"packing": True}},
    ],
)
def test_settings_that_cannot_work_are_refused(refused: Refused, fields: dict[str, Any]) -> None:
    refused(
        DistillConfig,
        **{"model": "model", "teacher": "teacher", "data": "d", "learning_rate": 0.001, "max_length": 64, **fields},
    )
