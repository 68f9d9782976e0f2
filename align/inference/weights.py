"""Weights for engines: read from a checkpoint, digested exactly, or handed over through a folder.

Unlike ``align.checks.facts.weights_digest``, which treats a checkpoint and its bfloat16 copy for the same base,
these tell types, shapes and every value apart. Tensors are hashed in several threads, 1.8 GiB/s each on the machine
where it was measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from align.config.user_paths import user_path
from align.models.checkpoints.files import CONFIG, read_optional, weight_files
from align.models.pretrained import stored_tensors
from align.models.tuning import HIGH, LOW, SCALE
from align.pipeline.process_limits import usable_cores
from align.store.json_files import write_text_atomically

HEAD = "lm_head.weight"
STORED_HEAD = "embed_out.weight"
"""Name of the head in the files of GPT-NeoX and in vLLM; transformers has it as ``HEAD``."""
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.word_embeddings.weight",
)
"""Names of embeddings in checkpoints; the others than the first are GPT-2's, OPT's and BLOOM's."""
WITHOUT_HEAD = ("bloom", "gemma", "gemma2", "gpt_neox")
"""Types of models whose vLLM model has no tensor ``HEAD``: Gemma and BLOOM compute logits with their embeddings."""


def needs_tied_head(config: Any) -> bool:
    """Return True if vLLM needs the embeddings of a model with this config also under the name of its head."""
    return bool(getattr(config, "tie_word_embeddings", False)) and config.model_type not in WITHOUT_HEAD


def with_tied_head(weights: Iterable[tuple[str, torch.Tensor]], tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, and after them the output head of a model with ``tied`` embeddings if it is not among them.

    The head has the embeddings' shape (V, H). vLLM's CPU backend keeps a packed copy of the head: without the head
    under its own name the sampler continues with the old one, silently.
    """
    embedding = None
    has_head = False
    for name, tensor in weights:
        has_head = has_head or name == HEAD
        if name in EMBEDDINGS:
            embedding = tensor
        yield name, tensor
    # Some checkpoints store a tied head, some do not.
    if tied and not has_head and embedding is not None:
        yield HEAD, embedding


LAYER = re.compile(r".*?\.\d+\.")
"""Beginning of the name of a layer's tensor."""


def with_stored_names(
    weights: Iterable[tuple[str, torch.Tensor]], model_dir: Path, names: Set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a live model under ``names``, the names of the tensors in the files of ``model_dir``.

    A head that vLLM refuses is skipped. transformers computes with all experts of a layer as one tensor (E, ...), and
    stores a tensor for each expert. One layer at a time is converted, so memory stays bounded.
    """
    layer = ""
    waiting: dict[str, torch.Tensor] = {}
    refuses_head = read_optional(model_dir / CONFIG).get("model_type") in WITHOUT_HEAD
    for live_name, tensor in weights:
        name = STORED_HEAD if live_name == HEAD and STORED_HEAD in names else live_name
        if name == HEAD and refuses_head:
            continue
        if name in names or name == HEAD:
            yield name, tensor
            continue
        match = LAYER.match(name)
        # The tensors of a layer follow each other, so the first tensor of another layer completes this one.
        if waiting and match is not None and match.group() != layer:
            yield from stored_tensors(model_dir, waiting).items()
            waiting = {}
        layer = layer if match is None else match.group()
        waiting[name] = tensor.detach()
    if waiting:
        yield from stored_tensors(model_dir, waiting).items()


Weights = Iterable[tuple[str, torch.Tensor]]


class AdaptedWeights:
    """Weights of a policy as a base that stays and an adapter, which is all that an engine with the base needs.

    Iterating yields all weights, with the bits of ``merged_weights``.
    """

    def __init__(
        self, key: object, base: Callable[[], Iterator[tuple[str, torch.Tensor]]], adapter: Mapping[str, torch.Tensor]
    ) -> None:
        """Bases with equal keys are equal. ``adapter`` has parts of low-rank updates, and whole tensors, by name.

        ``base`` yields all tensors in their shapes (``align.models.tuning.peft_layers.frozen_weights``).
        """
        self.key = key
        self.base = base
        self.adapter = adapter
        self.names = {name.rpartition(".")[0] if name.endswith((LOW, HIGH, SCALE)) else name for name in adapter}
        """Names of the tensors that differ from the base's."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return (self._merge(name, tensor) for name, tensor in self.base())

    def changed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all tensors of the layers that have an adapter: engines fuse matrices of a layer."""
        scopes = set(map(_scope_of, self.names))
        return (self._merge(name, tensor) for name, tensor in self.base() if _scope_of(name) in scopes)

    @torch.no_grad()
    def _merge(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Return a tensor (out, in) of the base with its update, in float32."""
        low = self.adapter.get(f"{name}{LOW}")
        if low is None:
            return name, self.adapter.get(name, tensor)
        # From the base each time: adding differences to merged weights would round them more with every update.
        update = self.adapter[f"{name}{HIGH}"] @ low * self.adapter[f"{name}{SCALE}"].item()
        return name, tensor.to(update.device).float().add(update)


def _scope_of(name: str) -> str:
    """Return the beginning of the names of a layer's tensors, or of a module's outside layers."""
    match = LAYER.match(name)
    return name.rpartition(".")[0] if match is None else match.group()


class HeldBase:
    """The base that an engine's weights were merged from."""

    key: object = None

    @contextlib.contextmanager
    def loading(self, weights: Weights) -> Iterator[Weights]:
        """Yield what an engine lacks of ``weights``: all tensors, or only changed layers if it has their base."""
        adapted = weights if isinstance(weights, AdaptedWeights) else None
        is_held = adapted is not None and adapted.key == self.key
        self.key = None  # a load that fails leaves a mixture
        yield adapted.changed() if adapted is not None and is_held else weights
        self.key = None if adapted is None else adapted.key


def adapter_weights(model_dir: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's stored adapter (``align.models.tuning.stored``) by name, if it has one.

    They have the shapes in which the adapter stored them.
    """
    from safetensors.torch import load_file

    file = model_dir / "adapter" / "adapter.safetensors"
    return load_file(file) if file.is_file() else {}


def weight_names(model_dir: Path) -> set[str]:
    """Return the names of a checkpoint's tensors, its stored adapter's names included."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names | set(adapter_weights(model_dir))


def refuse_missing(names: set[str], loaded: set[str]) -> None:
    """Raise ``ValueError`` unless every name was loaded: an engine keeps the old tensor if no new one comes."""
    missing = sorted(names - loaded)
    if missing:
        raise ValueError(f"the new weights lack {', '.join(missing[:3])}: a full set is needed")


def checkpoint_weights(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` of a checkpoint, on the CPU, for ``RolloutEngine.load_weights``."""
    from safetensors import safe_open

    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
                yield name, opened.get_tensor(name)
    yield from adapter_weights(model_dir).items()


MAX_THREADS = 16


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and bytes, for any shape and device."""
    values = tensor.detach().cpu().contiguous()
    hasher = hashlib.sha256(f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}".encode())
    content: Any = values.reshape(-1).view(torch.uint8).numpy()  # numpy's arrays are buffers, which its types omit
    hasher.update(content)
    return hasher.hexdigest()


def digest_all(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return the digest of each tensor, of any shape, by its name. Few tensors are held in memory at once."""
    workers = min(MAX_THREADS, usable_cores())
    digests: dict[str, str] = {}
    waiting: list[tuple[str, Future[str]]] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="weights-digest") as threads:
        for name, tensor in tensors:
            waiting.append((name, threads.submit(tensor_digest, tensor)))
            # Wait for the oldest digest before the next tensor is read, so memory stays bounded.
            if len(waiting) > 2 * workers:
                first, future = waiting.pop(0)
                digests[first] = future.result()
        digests |= {name: future.result() for name, future in waiting}
    return digests


def combine(digests: Mapping[str, str]) -> str:
    """Return one digest of named digests, independent of their order."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


READY = "READY"
"""File that is written last into a folder of weights: without it the folder is incomplete."""
SHARD_BYTES = 512 * 2**20
"""Weights held in memory at a time while they are written."""


class WeightsFolder:
    """Numbered versions of a policy's weights, each a complete model folder that servers read."""

    def __init__(self, spec: Any) -> None:
        """``spec`` is the servers' ``ServerSpec``."""
        self.spec = spec
        self.version = 0
        self.owner = secrets.token_hex(8)
        """Prefix of this run's version names: another run may give weights to the same server."""
        self.digests: dict[int, str] = {}
        """Version → digest of the tensors that were written."""
        self.base_key: object = None
        """Key of the base that was written last (``AdaptedWeights``)."""
        self.base: dict[str, str] = {}
        """Its folder and digest, as ``server_worker.WeightsKeeper`` takes them."""
        self.bases: dict[int, dict[str, str]] = {}
        """Version that is an adapter → its base."""
        self._temporary = contextlib.ExitStack()
        self.path = self.temporary(spec.pool.weights_folder)

    def temporary(self, parent: str | None = None) -> Path:
        """Return a new folder that ``close`` removes, inside ``parent`` if given."""
        outer = None if parent is None else user_path(parent).absolute()
        if outer is not None:
            outer.mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(prefix="align-", dir=outer, ignore_cleanup_errors=True)
        folder = Path(self._temporary.enter_context(directory))
        if outer is not None:
            folder.chmod(0o755)  # the server may run as another user; the outer folder says who gets in
        return folder

    def path_of(self, version: int) -> Path:
        """Return the folder of a version."""
        return self.path / f"step_{version}"

    def name_of(self, version: int) -> str:
        """Return the name of a version, unique among all runs."""
        return f"{self.owner}:{version}"

    def write(self, weights: Weights) -> int:
        """Write the next version and return its number. Floating-point tensors are written in the servers' type.

        Each tensor has the shape that the checkpoint gives its name. Of ``AdaptedWeights`` the base is written once,
        its adapted matrices as they are, and each version is an adapter, in float32.
        Raises ``ValueError`` when a tensor is missing; the version then does not exist.
        """
        version = self.version + 1
        # Files that name tensors otherwise than the live model does have no place for its adapter.
        if isinstance(weights, AdaptedWeights) and weights.names <= {*self.spec.tensor_names, HEAD}:
            if self.base_key != weights.key:
                folder = self.path / f"base_{version}"
                self.base = {"base": str(folder), "base_digest": self._write(weights.base(), folder, weights.names)}
                self.base_key = weights.key
            adapter = with_tied_head(weights.adapter.items(), self.spec.tied_embeddings)
            parts = weights.adapter.keys() - weights.names
            self.digests[version] = self._write(adapter, self.path_of(version), parts, is_full=False)
            self.bases[version] = self.base
        else:
            self.digests[version] = self._write(weights, self.path_of(version))
        self.version = version
        return version

    def _write(self, weights: Weights, folder: Path, exact: Set[str] = frozenset(), *, is_full: bool = True) -> str:
        """Write ``folder`` and return the digest of its tensors; names in ``exact`` keep their types."""
        spec = self.spec
        draft = folder.with_name(f"{folder.name}.partial")
        draft.mkdir()
        try:
            if is_full:
                stored = with_stored_names(weights, spec.model_dir, spec.tensor_names)
                weights = with_tied_head(stored, spec.tied_embeddings)
            digests = write_shards(weights, draft, spec.dtype, exact)
            if is_full:
                refuse_missing(set(spec.tensor_names), set(digests))
                self._copy_small_files(draft)
            # A server that looks for this version sees it complete or not at all; the marker says so to others.
            draft.rename(folder)
            (folder / READY).touch()
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return combine(digests)

    def _copy_small_files(self, folder: Path) -> None:
        """Copy configuration and tokenizer: servers treat the folder for their own checkpoint."""
        for file in self.spec.model_dir.iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)

    def announcement(self, version: int) -> dict[str, str]:
        """Return the arguments with which a server loads a version (``server_worker.WeightsKeeper``)."""
        call = {"path": str(self.path_of(version)), "version": self.name_of(version), "digest": self.digests[version]}
        return call | self.bases.get(version, {})

    def drop_before(self, version: int) -> None:
        """Remove the versions before ``version``."""
        for folder in self.path.glob("step_*"):
            number = folder.name.removeprefix("step_")
            if number.isdigit() and int(number) < version:
                shutil.rmtree(folder, ignore_errors=True)
                self.digests.pop(int(number), None)

    def close(self) -> None:
        """Remove all versions and temporary folders."""
        self._temporary.close()


def write_shards(weights: Weights, folder: Path, dtype: torch.dtype, exact: Set[str] = frozenset()) -> dict[str, str]:
    """Write safetensors of about ``SHARD_BYTES`` bytes each and their index; floating-point tensors in ``dtype``.

    Tensors keep their shapes, and names in ``exact`` their types. Returns name → digest of each tensor as written.
    """
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    digests: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        # Digests are of the tensors as written, in the servers' type. A server can compute the same ones.
        digests.update(digest_all(shard.items()))
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in weights:
        kind = dtype if tensor.is_floating_point() and name not in exact else tensor.dtype
        # A separate copy: safetensors refuses tensors that share memory, as a tied head does.
        copy = tensor.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        # Write what is held before the next tensor would pass the limit: only one shard is in memory.
        if shard and size + copy.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = copy
        size += copy.nbytes
    flush()
    content = {"metadata": {}, "weight_map": index}
    write_text_atomically(folder / "model.safetensors.index.json", json.dumps(content))
    return digests
