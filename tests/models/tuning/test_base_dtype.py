"""The frozen base below adapters: its type, what stays float32, and folding into the weights of the files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from align.config.tuning import FullTuning, LoraTuning, QloraTuning
from align.models.checkpoints.conversion import write_tensors
from align.models.compute.precision import autocast, float32_products
from align.models.loading import load_policy, load_tokenizer
from align.models.tuning.apply import apply_tuning, load_for_tuning, save_tuned
from tests.support.models.tuning.tuning_cases import CASES, ROWS, push, tuning_of
from tests.support.refusals import Refused


@pytest.fixture
def narrow_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with all weights in bfloat16, as models on the Hub are."""
    folder = tmp_path / "narrow"
    shutil.copytree(tiny_model, folder)
    return in_type(folder, torch.bfloat16)


def in_type(folder: Path, dtype: torch.dtype) -> Path:
    weights = load_file(folder / "model.safetensors")
    save_file({n: w.to(dtype) for n, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adapted(source: Path, tuning: Any) -> Any:
    """Return the model after a pretended training."""
    model = apply_tuning(load_for_tuning(source, tuning, "bfloat16"), tuning, 7, rows=ROWS).eval()
    push(model)
    return model


def folded(source: Path, tuning: Any, out_dir: Path) -> dict[str, torch.Tensor]:
    save_tuned(adapted(source, tuning), load_tokenizer(source), out_dir / "model")
    return load_file(out_dir / "model" / "model.safetensors")


def test_base_of_adapters_is_bfloat16_and_the_rest_float32(narrow_model: Path) -> None:
    model = adapted(narrow_model, LoraTuning(rank=4, save_modules=["embed_tokens"]))
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if is_matrix else torch.float32), name


FROM_WEIGHTS = {"dora", "orthogonal", "eva", "embeddings", "tokens"}
"""Tunings whose initial values are computed from the base's weights, which are rounded."""


@pytest.mark.parametrize("name", sorted(CASES.keys() - FROM_WEIGHTS))
def test_adapters_start_alike_on_both_bases(name: str, tiny_model: Path) -> None:
    tuning = tuning_of(CASES[name])
    wide, narrow = (
        apply_tuning(load_for_tuning(tiny_model, tuning, precision), tuning, 7, rows=ROWS)
        for precision in ("float32", "bfloat16")
    )
    started = {name: p for name, p in narrow.named_parameters() if p.requires_grad}
    for name, parameter in wide.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(started[name], parameter), name


@pytest.mark.parametrize("source", ["tiny_model", "narrow_model"])
def test_base_has_two_bytes_a_weight(source: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(source)
    total = sum(p.nbytes for p in load_for_tuning(folder, LoraTuning(), "bfloat16").parameters())
    count = sum(p.numel() for p in load_policy(folder).parameters())
    assert total / count <= 2.2


def test_full_tuning_and_float32_products_keep_float32(narrow_model: Path) -> None:
    cases: list[tuple[Any, Any]] = [(tuning, "bfloat16") for tuning in (FullTuning(), PISSA, WIDE)]
    for tuning, precision in [*cases, (LoraTuning(), "float32")]:
        model = load_for_tuning(narrow_model, tuning, precision)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


PISSA = LoraTuning(init="pissa")
WIDE = LoraTuning(base_dtype="float32")


@pytest.mark.parametrize("tuning", [LoraTuning(rank=4), LoraTuning(rank=4, dora=True)], ids=["lora", "dora"])
def test_folding_equals_peft_in_float32_rounded_once(narrow_model: Path, tmp_path: Path, tuning: LoraTuning) -> None:
    model = adapted(narrow_model, tuning)
    save_tuned(model, load_tokenizer(narrow_model), tmp_path / "out" / "model")
    ours = load_file(tmp_path / "out" / "model" / "model.safetensors")
    peft: Any = PeftModel.from_pretrained(load_policy(narrow_model), tmp_path / "out" / "adapter")
    expected = peft.merge_and_unload().state_dict()
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    changed = 0
    for name, tensor in ours.items():
        if tuning.dora:  # peft divides by the norms of another product's rounding
            torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-7, atol=1e-6)
        else:
            assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
        changed += not torch.equal(tensor, load_file(narrow_model / "model.safetensors")[name])
    assert changed


def test_files_in_float32_are_folded_into_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    ours = folded(tiny_model, LoraTuning(rank=4), tmp_path)
    peft: Any = PeftModel.from_pretrained(load_policy(tiny_model), tmp_path / "adapter")
    expected = peft.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("source", "method"),
    [*(("narrow_model", name) for name in sorted(CASES)), *(("tiny_model", name) for name in sorted(CASES)[::6])],
)
def test_saved_model_computes_as_the_live_one(
    source: str, method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(source)
    tuning = tuning_of(CASES[method])
    model = adapted(folder, tuning)
    save_tuned(model, load_tokenizer(folder), tmp_path / "out" / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    # peft multiplies by a tied head with trained rows itself.
    computing: Any = autocast("cpu", "bfloat16") if method == "tokens" else float32_products(model)
    with torch.no_grad(), computing:
        live = model(input_ids=ids).logits
        saved = load_policy(tmp_path / "out" / "model")(input_ids=ids).logits
    assert (live - saved).abs().max() < 0.05 * saved.abs().max()


def test_four_bits_are_saved_in_the_type_of_the_files(narrow_model: Path, tmp_path: Path) -> None:
    tuning = QloraTuning(rank=4)
    model = adapted(narrow_model, tuning)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.quant_state.dtype == torch.float32
    assert {t.dtype for t in folded(narrow_model, tuning, tmp_path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("tuning", [LoraTuning(), QloraTuning(), FullTuning()], ids=lambda tuning: tuning.method)
@pytest.mark.parametrize("reward", [False, True], ids=["policy", "reward"])
def test_weights_in_float16_are_refused(
    refused: Refused, tiny_model: Path, tmp_path: Path, tuning: Any, reward: bool
) -> None:
    shutil.copytree(tiny_model, tmp_path / "half")
    in_type(tmp_path / "half", torch.float16)
    refused(load_for_tuning, tmp_path / "half", tuning, "bfloat16", reward=reward)


def test_mixed_types_are_folded_in_the_widest(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "mixed")
    file = tmp_path / "mixed" / "model.safetensors"
    weights = load_file(file)
    wide = {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"}
    save_file({n: w if n in wide else w.bfloat16() for n, w in weights.items()}, file, metadata={"format": "pt"})
    tuning = LoraTuning(rank=4)
    model = adapted(tmp_path / "mixed", tuning)
    matrices = [p for p in model.parameters() if p.dim() == 2 and not p.requires_grad]
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    ours = folded(tmp_path / "mixed", tuning, tmp_path)
    # No weight is rounded: neither those in float32 nor the sums on those in bfloat16.
    peft: Any = PeftModel.from_pretrained(load_policy(tmp_path / "mixed"), tmp_path / "adapter")
    expected = peft.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


def test_files_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "c": torch.arange(4).view(2, 2),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(2.0),
        "mask": torch.tensor([True, False, True]),
    }
    write_tensors(tensors, str(tmp_path / "ours"), {"format": "pt"}, live=[])
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_only_folded_tensors_leave_memory(narrow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[torch.Tensor] = []
    monkeypatch.setattr("align.models.compute.processes.page_out", written.append)
    model = adapted(narrow_model, LoraTuning(rank=4))
    save_tuned(model, load_tokenizer(narrow_model), tmp_path / "out" / "model")
    assert sum(tensor.dim() == 2 for tensor in written) == 14  # 7 in each of 2 layers
    live = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not live & {tensor.untyped_storage().data_ptr() for tensor in written}


def test_narrow_base_without_narrow_products_is_refused(refused: Refused, tiny_model: Path) -> None:
    refused(lambda: load_for_tuning(tiny_model, LoraTuning(base_dtype="bfloat16"), "float32"))
