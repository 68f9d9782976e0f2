"""Model folders that are damaged or hostile: each is refused with the file, the finding and what to do."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.cli.main import main
from align.errors import UserError
from align.models.checkpoints.conversion import convert_gguf, copy_model
from align.models.checkpoints.files import read_header
from align.models.checkpoints.folder_checks import ADAPTER_CODE, check_adapter, check_folder
from align.models.checkpoints.source import identity, resolve
from align.models.pretrained import open_tokenizer
from tests.support.models.small_gguf import small_gguf
from tests.support.refusals import Refused

Change = Callable[[Path], None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER, SETTINGS = "config.json", "tokenizer.json", "tokenizer_config.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def put(name: str, content: bytes | str) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: void((folder / name).write_bytes(data))


def void(_: object) -> None:
    """Nothing, whatever a call returns."""


def cut(name: str, share: float = 0.5) -> Change:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return change


def edit(name: str, **values: Any) -> Change:
    """A JSON file with other values; ``...`` takes a field out."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / name).read_text()) | values
        remaining = {field: value for field, value in settings.items() if value is not ...}
        (folder / name).write_text(json.dumps(remaining))

    return change


def edit_tensors(change_tensors: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change_tensors(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def edit_header(change_header: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change_header(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


def edit_vocabulary(change_tokens: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        change_tokens(content)
        (folder / TOKENIZER).write_text(json.dumps(content))

    return change


def shard(mapping: Callable[[list[str]], Any], rename: str | None = "part-1.safetensors") -> Change:
    """An index beside the weights, which are renamed unless ``rename`` is None."""

    def change(folder: Path) -> None:
        names = list(read_header(folder / WEIGHTS))
        if rename is not None:
            (folder / WEIGHTS).rename(folder / rename)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping(names)}))

    return change


def link_out(name: str) -> Change:
    def change(folder: Path) -> None:
        target = folder.parent / f"elsewhere-{name}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return change


NORM = "model.norm.weight"
DEEP = "[" * 100_000
CASES: dict[str, tuple[Change, str, str]] = {
    # what is wrong: (how it is done, the file that the message names, what it says)
    "config missing": (remove(CONFIG), "", "holds no config.json"),
    "config empty": (put(CONFIG, ""), CONFIG, "cannot be read as JSON"),
    "config cut": (cut(CONFIG), CONFIG, "cannot be read as JSON"),
    "config garbage": (put(CONFIG, b"\xff\xfe\x00garbage"), CONFIG, "cannot be read as JSON"),
    "config a list": (put(CONFIG, "[]"), CONFIG, "expected a JSON object, found list"),
    "config nested": (put(CONFIG, DEEP), CONFIG, "nested too deeply"),
    "config without type": (edit(CONFIG, model_type=...), CONFIG, "no model_type"),
    "config of unknown type": (edit(CONFIG, model_type="gpt9"), CONFIG, "gpt9"),
    "config of no language model": (edit(CONFIG, model_type="vit"), CONFIG, "vit"),
    "layers negative": (edit(CONFIG, num_hidden_layers=-2), CONFIG, "num_hidden_layers is -2"),
    "layers countless": (edit(CONFIG, num_hidden_layers=10**9), CONFIG, "num_hidden_layers is 1000000000"),
    "layers more than tensors": (edit(CONFIG, num_hidden_layers=10**5), CONFIG, "less than one for each layer"),
    "layers a text": (edit(CONFIG, num_hidden_layers="2"), CONFIG, "num_hidden_layers is '2'"),
    "layers true": (edit(CONFIG, num_hidden_layers=True), CONFIG, "num_hidden_layers is True"),
    "one layer too many": (edit(CONFIG, num_hidden_layers=3), "", "lacks 9 tensors that its config.json asks for"),
    "one layer too few": (edit(CONFIG, num_hidden_layers=1), "", "holds 9 tensors for which its config.json has no"),
    "width 0": (edit(CONFIG, hidden_size=0), CONFIG, "hidden_size is 0"),
    "width another": (edit(CONFIG, hidden_size=32), "", "is of shape"),
    "inner width another": (edit(CONFIG, intermediate_size=64), "", "mlp.down_proj.weight is of shape [64, 128]"),
    "heads no divisor": (edit(CONFIG, head_dim=None, num_attention_heads=3), CONFIG, "no multiple of 3"),
    "vocabulary too small": (edit(CONFIG, vocab_size=200), "", "embed_tokens.weight is of shape [260, 64]"),
    "vocabulary too large": (edit(CONFIG, vocab_size=300), "", "asks for [300, 64]"),
    "vocabulary countless": (edit(CONFIG, vocab_size=10**12), CONFIG, "vocab_size is 1000000000000"),
    "eos out of range": (edit(CONFIG, eos_token_id=999), CONFIG, "eos_token_id is 999"),
    "eos a text": (edit(CONFIG, eos_token_id="</s>"), CONFIG, "eos_token_id is '</s>'"),
    "pad negative": (edit(CONFIG, pad_token_id=-7), CONFIG, "pad_token_id is -7"),
    "a number NaN": (edit(CONFIG, rms_norm_eps=float("nan")), CONFIG, "rms_norm_eps is nan"),
    "activation unknown": (edit(CONFIG, hidden_act="evil"), "", "cannot be loaded"),
    "dtype unknown": (edit(CONFIG, dtype="float99"), CONFIG, "dtype is 'float99'"),
    "architectures a number": (edit(CONFIG, architectures=3), CONFIG, "architectures is 3"),
    "attention from the Hub": (edit(CONFIG, attn_implementation="evil/kernel"), CONFIG, "fetched from the Hub and run"),
    "weights elsewhere": (edit(CONFIG, transformers_weights="../x.safetensors"), CONFIG, "transformers_weights"),
    "weights quantized": (edit(CONFIG, quantization_config={"quant_method": "gptq"}), CONFIG, "are quantized (gptq)"),
    "code of its own": (
        edit(CONFIG, model_type="mine", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}),
        CONFIG,
        "without running Python code",
    ),
    "tokenizer missing": (remove(TOKENIZER), "", "holds no tokenizer.json"),
    "tokenizer empty": (put(TOKENIZER, ""), TOKENIZER, "cannot be read as JSON"),
    "tokenizer cut": (cut(TOKENIZER), TOKENIZER, "cannot be read as JSON"),
    "tokenizer a list": (put(TOKENIZER, "[1]"), TOKENIZER, "found list"),
    "tokenizer without model": (edit(TOKENIZER, model=...), TOKENIZER, "no 'model'"),
    "tokenizer of another model": (
        edit_vocabulary(lambda content: content["model"]["vocab"].update(new=5000)),
        TOKENIZER,
        "the id 5000",
    ),
    "tokenizer with a negative id": (
        edit_vocabulary(lambda content: content["model"]["vocab"].update(new=-1)),
        TOKENIZER,
        "has the id -1",
    ),
    "tokenizer of an unknown type": (
        edit_vocabulary(lambda content: content["model"].update(type="Magic")),
        "",
        "cannot be loaded",
    ),
    "tokenizer adds tokens": (edit(SETTINGS, pad_token="<|new|>"), "", "embeds 260"),
    "settings garbage": (put(SETTINGS, "{"), SETTINGS, "cannot be read as JSON"),
    "settings a list": (put(SETTINGS, "[]"), SETTINGS, "found list"),
    "settings with a number for a token": (edit(SETTINGS, eos_token=7), SETTINGS, "eos_token is 7"),
    "settings with a number for a template": (edit(SETTINGS, chat_template=7), SETTINGS, "chat_template is an int"),
    "settings with another tokenizer file": (
        edit(SETTINGS, fast_tokenizer_files=["../tokenizer.4.0.json"]),
        SETTINGS,
        "fast_tokenizer_files",
    ),
    "settings with code": (edit(SETTINGS, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["m.T", None]}), "", ""),
    "template empty": (put(TEMPLATE, ""), TEMPLATE, "is empty"),
    "template no text": (put(TEMPLATE, b"\xff\xff"), TEMPLATE, "cannot be read as text"),
    "template with broken syntax": (put(TEMPLATE, "{% for %}"), "", "chat template"),
    "template without end": (
        put(TEMPLATE, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        "",
        "did not end within",
    ),
    "template of 10**9 turns": (put(TEMPLATE, "{% for i in range(10**9) %}{% endfor %}"), "", "Range too big"),
    "template that fills the memory": (put(TEMPLATE, "{{ 'x' * 10**11 }}"), "", "MiB of memory"),
    "template with Python's insides": (put(TEMPLATE, "{{ ''.__class__.__mro__ }}"), "", "unsafe"),
    "template that refuses all": (put(TEMPLATE, "{{ raise_exception('no') }}"), "", "refuses a conversation"),
    "weights missing": (remove(WEIGHTS), "", "holds no weights"),
    "weights empty": (put(WEIGHTS, ""), WEIGHTS, "0 bytes"),
    "weights cut": (cut(WEIGHTS), WEIGHTS, "its header speaks of"),
    "weights cut in the header": (cut(WEIGHTS, 0.001), WEIGHTS, "no header of safetensors"),
    "weights with a huge header": (put(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), WEIGHTS, "no header"),
    "weights with a broken header": (put(WEIGHTS, struct.pack("<Q", 4) + b"{{{{"), WEIGHTS, "no header"),
    "weights with a list for a header": (put(WEIGHTS, struct.pack("<Q", 2) + b"[]"), WEIGHTS, "no JSON object"),
    "weights of an unknown type": (
        edit_header(lambda header: header[NORM].update(dtype="F31")),
        WEIGHTS,
        "unknown type 'F31'",
    ),
    "weights of another type": (
        edit_header(lambda header: header[NORM].update(dtype="F16")),
        WEIGHTS,
        f"bytes for the tensor {NORM}",
    ),
    "weights of another shape": (
        edit_header(lambda header: header[NORM].update(shape=[65])),
        WEIGHTS,
        f"bytes for the tensor {NORM}",
    ),
    "weights of a negative shape": (
        edit_header(lambda header: header[NORM].update(shape=[-64])),
        WEIGHTS,
        "impossible shape",
    ),
    "weights that overlap": (
        edit_header(lambda header: header[NORM].update(data_offsets=[0, 256])),
        WEIGHTS,
        "overlaps another",
    ),
    "weights not described": (
        edit_header(lambda header: header.update({NORM: 3})),
        WEIGHTS,
        f"describe the tensor {NORM}",
    ),
    "weights in whole numbers": (
        edit_tensors(lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int8)})),
        "",
        "is quantized (I8)",
    ),
    "weights with NaN": (
        edit_tensors(lambda tensors: tensors[NORM].fill_(float("nan"))),
        "",
        f"weight '{NORM}' holds NaN",
    ),
    "weights with infinity": (edit_tensors(lambda tensors: tensors[NORM].fill_(float("inf"))), "", "NaN or infinity"),
    "a tensor too few": (
        edit_tensors(lambda tensors: tensors.pop(NORM)),
        "",
        f"lacks 1 tensor that its config.json asks for: {NORM}",
    ),
    "a tensor too many": (
        edit_tensors(lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)})),
        "",
        "has no place: model.extra.weight",
    ),
    "a head of another kind": (
        edit_tensors(lambda tensors: tensors.update({"score.weight": torch.ones(1, 64)})),
        "",
        "has no place: score.weight",
    ),
    "index without shards": (shard(lambda names: dict.fromkeys(names, "gone.safetensors")), INDEX, "no such file"),
    "index with a pickle": (shard(lambda names: dict.fromkeys(names, "evil.bin")), INDEX, "run code when opened"),
    "index with one pickle": (
        shard(lambda names: dict.fromkeys(names, "part-1.safetensors") | {NORM: "evil.pt"}),
        INDEX,
        "evil.pt, pickled",
    ),
    "index out of the folder": (
        shard(lambda names: dict.fromkeys(names, "../x.safetensors")),
        INDEX,
        "in the same folder",
    ),
    "index with an absolute path": (
        shard(lambda names: dict.fromkeys(names, "/x.safetensors")),
        INDEX,
        "in the same folder",
    ),
    "index with a number": (shard(lambda names: dict.fromkeys(names, 3)), INDEX, "names 3 as a file"),
    "index without a map": (shard(lambda names: [1]), INDEX, "no weight_map"),
    "index garbage": (
        lambda folder: void([put(INDEX, "{")(folder), remove(WEIGHTS)(folder)]),
        INDEX,
        "cannot be read as JSON",
    ),
    "index beside other weights": (
        shard(lambda names: dict.fromkeys(names, "part-1.safetensors"), rename=None),
        INDEX,
        "other loaders",
    ),
    "shards without an index": (
        lambda folder: void((folder / WEIGHTS).rename(folder / "part-1.safetensors")),
        "",
        "part-1.safetensors, but neither",
    ),
    "weights a link out": (link_out(WEIGHTS), WEIGHTS, "outside the folder"),
    "tokenizer a link out": (link_out(TOKENIZER), TOKENIZER, "outside the folder"),
    "only pickles": (
        lambda folder: void((folder / WEIGHTS).rename(folder / "pytorch_model.bin")),
        "",
        "only pickled weights",
    ),
    "generation garbage": (put(GENERATION, "{"), GENERATION, "cannot be read as JSON"),
    "generation with an end out of range": (edit(GENERATION, eos_token_id=[2, 999]), GENERATION, "eos_token_id is 999"),
    "generation with a temperature below 0": (edit(GENERATION, temperature=-1), GENERATION, "temperature is -1"),
    "generation with a text": (edit(GENERATION, temperature="hot"), GENERATION, "temperature is 'hot'"),
    "generation with infinity": (edit(GENERATION, top_p=float("inf")), GENERATION, "top_p is inf"),
    "generation that contradicts itself": (edit(GENERATION, early_stopping=True), GENERATION, "early_stopping"),
    "generation with an unknown cache": (edit(GENERATION, cache_implementation="evil"), "", "cache_implementation"),
    "generation with a text for a list": (edit(GENERATION, watermarking_config="x"), "", "cannot be loaded"),
    "generation with code": (edit(GENERATION, custom_generate="evil/code"), GENERATION, "custom_generate"),
    "an adapter among the weights": (
        put("adapter_config.json", '{"base_model_name_or_path": "evil/x"}'),
        "adapter_config.json",
        "adapter",
    ),
    "an adapter without its base": (
        lambda folder: void([remove(CONFIG)(folder), put("adapter_config.json", "{}")(folder)]),
        "",
        "without its base model",
    ),
}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def bring_in(folder: Path, out: Path) -> None:
    """What a plan and then a model stage do with a folder."""
    resolve(str(folder), None, folder.parent)
    copy_model(folder, out, warn=print)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_refused_with_file_finding_and_remedy(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, file, finding = CASES[name]
    if name == "template without end":
        monkeypatch.setattr("align.models.chat.chat_template.SECONDS", 2.0)
    change(folder)
    with pytest.raises(UserError) as caught:
        bring_in(folder, tmp_path / "out")
    message = str(caught.value)
    assert finding in message
    assert str(folder / file if file else folder) in message
    assert len(message.split(". ")) > 1, "no remedy"
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_there_are_cases_enough_and_a_whole_folder_passes(folder: Path, tmp_path: Path) -> None:
    assert len(CASES) >= 40
    bring_in(folder, tmp_path / "out")
    shard(lambda names: dict.fromkeys(names, "part-1.safetensors"))(folder)
    bring_in(folder, tmp_path / "again")


def gguf_header(count: int) -> bytes:
    """Of ``count`` tensors and as many fields."""
    return b"GGUF" + struct.pack("<IQQ", 3, count, count)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"pickle", gguf_header(2**60), gguf_header(1) + bytes(99)],
    ids=["empty", "cut", "another format", "endless counts", "zeros"],
)
def test_a_damaged_gguf_is_refused(refused: Refused, content: bytes, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(content)
    refused(convert_gguf, gguf, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (small_gguf(size=4 * 34 - 1), r"header speaks of \d+ for the tensor token_embd.weight"),
        (small_gguf(offset=64), "header speaks of"),
        (small_gguf(offset=2**62), "header speaks of"),
        (small_gguf(offset=7), "overlaps another or is not aligned"),
        (small_gguf(kind=999), "token_embd.weight of the unknown type 999"),
        (small_gguf(shape=(31, 4)), r"impossible shape \[31, 4\] .* of type Q8_0"),
        (small_gguf(shape=(32, 0)), "impossible shape"),
        (small_gguf(shape=(2**62, 2**62)), "header speaks of"),
        (small_gguf(shape=(32, 1, 1, 2, 2)), "has 5 dimensions"),
        (small_gguf(shape=()), "has 0 dimensions"),
        (small_gguf(fields={"llama.block_count": 2**40}), "llama.block_count 1099511627776, which no model has"),
        (small_gguf(fields={"llama.block_count": 1000}), "llama.block_count 1000 and only 1 tensors"),
        (small_gguf(fields={"llama.attention.head_count": 0}), "llama.attention.head_count 0, which no model has"),
        (small_gguf(fields={"llama.embedding_length": 64}), r"embedding_length 64 and token_embd.weight of shape"),
        (small_gguf(fields={"general.alignment": 33}), "general.alignment 33"),
        (small_gguf()[:100], "an array of 2 entries"),
        (b"GGUF" + struct.pack("<IQQ", 1, 1, 0) + bytes(99), "has the version 1"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_plan_refuses_a_gguf_whose_header_is_not_true(
    refused: Refused, content: bytes, message: str, tmp_path: Path
) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(content)
    refused(lambda: identity(str(gguf), None, tmp_path))


def test_plan_accepts_a_small_gguf(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(small_gguf())
    assert identity(str(gguf), None, tmp_path).startswith("gguf:")


def test_what_lies_beside_a_gguf_is_not_read(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(small_gguf())
    (tmp_path / SETTINGS).write_text('{"auto_map": {"AutoTokenizer": ["m.T", null]}}')
    listings: list[list[str]] = []

    def listing(folder: str, **options: Any) -> None:
        listings.append(sorted(file.name for file in Path(folder).iterdir()))
        raise ValueError("no more is needed")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", listing)
    refused(convert_gguf, gguf, tmp_path / "out")
    assert listings == [["model.gguf"]]


@pytest.mark.parametrize("field", ADAPTER_CODE)
def test_an_adapter_that_names_code_or_files_is_refused(refused: Refused, field: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", field: {"x": 1}}))
    refused(check_adapter, tmp_path)


def test_adapter_of_other_adapters_is_refused(refused: Refused, tmp_path: Path) -> None:
    """peft would open the folders, and unpickle what is in them."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "XLORA"}))
    refused(check_adapter, tmp_path)


def test_path_fields_of_peft_are_refused() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    classes = [*PEFT_TYPE_TO_CONFIG_MAPPING.values(), CordaConfig, LoraGAConfig]
    names = {field.name for config in classes for field in fields(config)}
    paths = {name for name in names if name.endswith(("_path", "_file", "_dir", "_model", "_folder"))}
    assert paths - {"base_model_name_or_path"} <= set(ADAPTER_CODE)


def make_large(file: Path) -> None:
    """Create a file of 1 TiB, of which nothing is on the disk."""
    file.write_bytes(b"")
    os.truncate(file, 2**40)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda file: file.symlink_to(target)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "device": link_to("/dev/zero"),
    "pipe": lambda file: os.mkfifo(file),
    "dangling": link_to("gone"),
    "large": make_large,
}


@pytest.mark.parametrize("name", [TOKENIZER, GENERATION, TEMPLATE, "vocab.txt"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_file_is_refused_before_opening(refused: Refused, name: str, kind: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    SPECIAL[kind](folder / name)
    refused(lambda: resolve(str(folder), None, folder.parent))
    (folder / CONFIG).rename(folder / "other")  # a folder with a tokenizer only
    refused(open_tokenizer, folder)


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_adapter_config_is_refused(refused: Refused, kind: str, tmp_path: Path) -> None:
    SPECIAL[kind](tmp_path / "adapter_config.json")
    refused(check_adapter, tmp_path)


def test_an_adapter_with_pickled_weights_alone_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    (tmp_path / "other.safetensors").write_bytes(b"")
    refused(check_adapter, tmp_path)


def test_the_layout_of_the_hubs_cache_is_read(tiny_model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(tiny_model.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    check_folder(snapshot)


@pytest.mark.parametrize("name", [WEIGHTS, TEMPLATE, "additional_chat_templates/tool_use.jinja", "vocab.bpe"])
def test_the_key_covers_every_file_that_is_read(name: str, folder: Path) -> None:
    before = identity(str(folder), None, folder.parent)
    if name == WEIGHTS:
        edit_tensors(lambda tensors: tensors[NORM].add_(1))(folder)
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{{ 'other' }}")
    assert identity(str(folder), None, folder.parent) != before


def test_the_key_covers_shards(folder: Path) -> None:
    shard(lambda names: dict.fromkeys(names, "part-1.safetensors"))(folder)
    before = identity(str(folder), None, folder.parent)
    data = bytearray((folder / "part-1.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "part-1.safetensors").write_bytes(bytes(data))
    assert identity(str(folder), None, folder.parent) != before


def test_a_plan_looks_at_a_folder_without_torch_and_refuses_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import sys; from pathlib import Path; from align.models.checkpoints.source import identity; "
        "identity(sys.argv[1], None, Path('.')); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shard(lambda names: dict.fromkeys(names, "evil.bin"))(folder)
    pipeline = folder.parent / "p.yaml"
    pipeline.write_text(f"name: p\nstages:\n  model: {{source: {folder}}}\n")
    assert main(["plan", str(pipeline), "--store", str(folder.parent / "store")]) == 2
    assert f"{folder / INDEX}: names evil.bin, pickled weights" in capsys.readouterr().err


def test_a_chat_with_a_damaged_folder_ends_with_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(WEIGHTS)(folder)
    assert main(["chat", str(folder)]) == 2
    assert f"{folder / WEIGHTS}: has" in capsys.readouterr().err


def test_model_stage_refuses_a_stored_adapter(refused: Refused, folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter.json").write_text("{}")
    refused(lambda: resolve(str(folder), None, folder.parent))
