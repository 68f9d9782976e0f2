"""The one door: every call that loads a model or a tokenizer is in it, and neither runs code nor invents weights."""

from __future__ import annotations

import ast
import builtins
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import align
from align.cli.arguments import find_tokenizer
from align.inference.replier import Replier
from align.lint.trainer import load_tokenizer_and_limits as load_for_lint
from align.models.built_in import make_tiny_tokenizer
from align.models.fast.real_tokens import compute_real_tokens
from align.models.loading import load_policy, load_reward, load_tokenizer, new_reward
from align.models.pretrained import needs_eager_attention, open_model, open_tokenizer
from tests.support.refusals import Refused

PACKAGE = Path(align.__file__).parent
DOOR = Path("models", "pretrained.py")
LOADERS = {
    "from_pretrained",
    "from_config",
    "LLM",
    "AsyncLLM",
    "pipeline",
    "simple_evaluate",
    "load_checkpoint_and_dispatch",
}
PARAMETER = {DOOR, Path("models", "checkpoints", "conversion.py")}
"""Files in which ``trust_remote_code`` is passed on from the config of a ``model`` stage."""
FOREIGN = Path("extensions/formats/llmcompressor_script.py")
"""A program for an interpreter that has no align."""


@functools.cache
def calls() -> list[tuple[Path, ast.Call, str]]:
    return [
        (file.relative_to(PACKAGE), node, node.func.id if isinstance(node.func, ast.Name) else node.func.attr)
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    ]


def test_models_are_loaded_only_by_pretrained_or_without_code() -> None:
    count = 0
    for file, call, name in calls():
        if name not in LOADERS or (name == "pipeline" and not isinstance(call.func, ast.Name)):
            continue
        count += 1
        place = f"{file}:{call.lineno}: {name}"
        if name == "LLM" or file == FOREIGN:
            assert any(_is_false(word) for word in call.keywords), place
        elif name == "simple_evaluate":
            assert "_model_arguments" in ast.unparse(call), place
        else:
            assert file == DOOR, place
            takes = "Auto" in ast.unparse(call.func) or ast.unparse(call.func).startswith("auto")
            words = [word for word in call.keywords if word.arg == "trust_remote_code"]
            # peft, model2vec and a transformers class that is named know no code of a model's own
            assert words or not takes or "_model_mapping" in ast.unparse(call.func), place
    assert count >= 10


def _is_false(word: ast.keyword) -> bool:
    return word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False


def test_only_a_model_stage_allows_code_of_a_model() -> None:
    for file, call, _ in calls():
        for word in call.keywords:
            if word.arg == "trust_remote_code" and not _is_false(word):
                passed_on = ast.unparse(word.value) in ("trust_remote_code", "config.trust_remote_code")
                assert passed_on, f"{file}:{call.lineno}"
                assert file in PARAMETER or file == Path("stages", "model.py"), f"{file}:{call.lineno}"
    text = (PACKAGE / "evaluation" / "lm_eval" / "worker.py").read_text(encoding="utf-8")
    assert '"trust_remote_code": False' in text
    for file in PACKAGE.rglob("*.py"):
        assert "--trust-remote-code" not in file.read_text(encoding="utf-8"), file


def test_nothing_unpickles() -> None:
    for file, call, name in calls():
        if not name.startswith("load"):
            continue
        place = f"{file}:{call.lineno}"
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        assert owner not in ("pickle", "cloudpickle", "joblib", "dill"), place
        if owner == "torch" and name == "load":
            assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords), (
                place
            )


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def with_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that brings code for config, model and tokenizer; a question would be answered with yes."""
    mark = folder.parent / "code-ran"
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit\n")
    maps = {
        "config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}},
        "tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.T", None]}},
    }
    for name, changes in maps.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return folder


@pytest.mark.parametrize("name", ["chat", "data show", "lint", "policy", "reward", "tokenizer"])
def test_commands_run_no_code_of_a_model(refused: Refused, name: str, with_code: Path) -> None:
    commands = {
        "chat": lambda: Replier(with_code, 0.0, 8),
        "data show": lambda: find_tokenizer(str(with_code), None),
        "lint": lambda: load_for_lint(str(with_code), with_code.parent, None),
        "policy": lambda: load_policy(with_code),
        "reward": lambda: load_reward(with_code),
        "tokenizer": lambda: load_tokenizer(with_code),
    }
    refused(lambda: commands[name]())
    assert not (with_code.parent / "code-ran").exists()


def test_a_tokenizers_code_alone_is_not_run_either(refused: Refused, with_code: Path, tiny_model: Path) -> None:
    shutil.copyfile(tiny_model / "config.json", with_code / "config.json")
    refused(load_tokenizer, with_code)
    assert not (with_code.parent / "code-ran").exists()


def test_code_next_to_a_known_type_is_ignored(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load_policy(folder)).__name__ == "LlamaForCausalLM"


def _tensors(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("load", [load_policy, new_reward])
def test_tensors_that_are_missing_or_left_over_are_named(refused: Refused, load, folder: Path) -> None:
    lost = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"]
    _tensors(folder, lambda tensors: [tensors.pop(name) for name in lost])
    refused(load, folder)


def test_what_is_left_over_is_named(refused: Refused, folder: Path) -> None:
    _tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)})
    )
    for load in (load_policy, new_reward):
        refused(load, folder)


def test_a_reward_model_is_no_policy(refused: Refused, tiny_reward: Path) -> None:
    refused(load_policy, tiny_reward)


def test_what_transformers_documents_as_absent_or_ignorable_is(folder: Path) -> None:
    """A tied head, stored or not; buffers of rotary embeddings, which old checkpoints hold."""
    _tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    plain = load_policy(folder)
    _tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_policy(folder).lm_head.weight, plain.lm_head.weight)


def test_missing_untied_head_fails_only_a_policy(refused: Refused, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    refused(load_policy, folder)
    assert not new_reward(folder).score.weight.any()
    _tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(260, 64)}))
    assert load_policy(folder).lm_head.weight.eq(1).all()
    assert not new_reward(folder).score.weight.any()


def test_an_encoder_leaves_heads_aside_and_no_layer(refused: Refused, folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.update({"score.weight": torch.ones(1, 64)}))
    assert open_model("encoder", folder, torch.float32)[0].layers[1] is not None
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    refused(open_model, "encoder", folder, torch.float32)


def test_loading_draws_no_numbers_and_reads_no_unfit_model(
    refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_rng_state()
    load_policy(folder)
    assert torch.equal(torch.get_rng_state(), before)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    refused(load_policy, folder)


def test_a_hub_name_that_cannot_be_fetched_is_the_users_error(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    refused(open_tokenizer, "no/such-model", revision="0" * 40)


# ---- what attention ignores ----

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.5, "sliding_window": 8,
}  # fmt: skip


def make_gemma2(folder: Path) -> Path:
    """Save an untrained Gemma 2 whose attention scores exceed their cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = make_tiny_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    Gemma2ForCausalLM(
        Gemma2Config(**SMALL, **ids, vocab_size=len(tokenizer), attn_logit_softcapping=1.0)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def losses_and_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    ids = torch.arange(40, 72).view(2, 16)
    loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_gemma2_keeps_its_cap_on_attention_scores(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_gemma2(tmp_path)
    eager, sdpa = (
        losses_and_gradients(
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name, dtype=torch.float32)
        )
        for name in ("eager", "sdpa")
    )
    assert abs(eager[0] - sdpa[0]) > 1e-3  # the cap matters
    model = load_policy(folder)
    assert not compute_real_tokens(model)
    actual = losses_and_gradients(model)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(actual, eager, strict=True))
    assert new_reward(folder).config._attn_implementation == "eager"


def test_model_without_cap_keeps_fast_attention(tmp_path: Path) -> None:
    from transformers import Gemma2Config, GptOssConfig, GptOssForCausalLM

    assert not needs_eager_attention(tmp_path, Gemma2Config(attn_logit_softcapping=None))
    # transformers' own choice for a model with attention sinks
    config = GptOssConfig(**SMALL, vocab_size=100, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0)
    assert GptOssForCausalLM(config).config._attn_implementation == "eager"


def test_cap_that_attention_lacks_is_refused(refused: Refused, tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(attn_logit_softcapping=50.0)
    refused(needs_eager_attention, tmp_path, config)
    assert needs_eager_attention(tmp_path, config, has_own_code=True)
