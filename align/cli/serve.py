"""``align serve CHECKPOINT...``: vLLM's OpenAI server on this machine, with the checkpoint's template and sampling.

One server per checkpoint, each at a port. The servers have one key, which is printed once; every request needs it. They
end when this command ends, for whatever reason.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.arguments import find_checkpoint
from align.cli.lineage import find_base, record_of, refuse_damage
from align.cli.parser import add_store, print_json
from align.config.user_paths import user_path
from align.errors import UserError, printable
from align.models.checkpoints.files import ADAPTER_CONFIG, read_optional

if TYPE_CHECKING:
    from align.inference.servers.openai_server import OpenAiServer, ServedModel

TIMEOUT = 900.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="a folder, a key, or PIPELINE:STAGE; a server for each"
    )
    parser.add_argument(
        "--adapters", nargs="+", metavar="NAME=PATH", default=[], help="LoRA adapters of the checkpoint, served with it"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the model in requests (default: its folder or stage)")
    parser.add_argument("--port", type=int, metavar="N", help="port of the first server (default: a free port)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="type of the computation")
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens of a conversation")
    parser.add_argument("--cache-gb", type=float, default=1.0, metavar="GB", help="memory for keys and values on a CPU")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="time to start (900)")
    parser.add_argument("--vllm", nargs="+", default=[], metavar="OPTION", help="options of vLLM: --vllm=--seed=1")
    add_store(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``align serve``."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("align serve needs vLLM, which is not installed: pip install 'align-pipeline[vllm]'.")
    if options.adapters and len(options.checkpoints) > 1:
        raise UserError("--adapters belong to one base model; name one checkpoint.")
    if options.name is not None and len(options.checkpoints) > 1:
        raise UserError("--name is the name of one model; name one checkpoint.")
    models = [_model(word, options) for word in options.checkpoints]
    return _serve(models, options)


def _model(word: str, options: argparse.Namespace) -> ServedModel:
    """Return what is served for a checkpoint, checked."""
    from align.inference.servers.openai_server import ServedModel

    folder = find_checkpoint(word, options.store)
    refuse_damage(folder, thorough=False)
    adapters = _adapters(options.adapters, folder)
    rank = _largest_rank(adapters)
    artifact = record_of(folder)
    name = options.name or (folder.resolve().name if artifact is None else artifact.stage)
    if name in adapters:
        raise UserError(f"--adapters {name}=...: the model itself has this name; choose another, or --name.")
    is_on_cpu, dtype, parser = _engine_facts(folder)
    return ServedModel(
        folder,
        name,
        adapters,
        rank,
        options.dtype or dtype,
        options.max_length,
        parser,
        is_on_cpu,
        options.cache_gb,
        tuple(options.vllm),
    )


def _adapters(words: Sequence[str], base: Path) -> dict[str, Path]:
    """Return name → folder of ``--adapters``. Raises ``UserError`` for a word or an adapter that does not fit."""
    from align.export.lora import check_lora

    adapters: dict[str, Path] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or not name or not path:
            raise UserError(f"--adapters {word}: write NAME=PATH, the name in requests and the adapter's folder.")
        if name in adapters:
            raise UserError(f"--adapters {word}: two adapters have the name {name}.")
        folder = user_path(path)
        if not (folder / ADAPTER_CONFIG).is_file() and (folder / "adapter" / ADAPTER_CONFIG).is_file():
            folder = folder / "adapter"
        if not (folder / ADAPTER_CONFIG).is_file():
            raise UserError(f"--adapters {word}: {folder} has no {ADAPTER_CONFIG}; name an adapter's folder.")
        check_lora(folder)
        refuse_damage(folder, thorough=False)
        # An adapter that was trained on another base answers nonsense without an error.
        find_base(folder, str(read_optional(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""), base)
        adapters[name] = folder.resolve()
    return adapters


def _largest_rank(adapters: dict[str, Path]) -> int:
    from align.export.lora import allowed_rank, check_lora

    return max([allowed_rank(check_lora(folder).rank) for folder in adapters.values()], default=16)


def _engine_facts(folder: Path) -> tuple[bool, str, str | None]:
    """Return whether vLLM computes on the CPU, the type to compute in, and the parser of thoughts if the model thinks.

    On a CPU it multiplies faster in this type; on a GPU vLLM decides.
    """
    from align.config.runtime import Runtime
    from align.export.thinking import reasoning_parser
    from align.inference.vllm import why_model_unusable, why_unusable
    from align.models.compute.precision import resolve_precision
    from align.models.compute.processes import device_of
    from align.models.loading import load_tokenizer
    from align.models.pretrained import open_config

    device = device_of(Runtime())
    reason = why_unusable() or why_model_unusable(folder, device)
    if reason is not None:
        raise UserError(f"{folder}: {reason}")
    is_on_cpu = device.type == "cpu"
    dtype = str(resolve_precision("auto", device)) if is_on_cpu else "auto"
    return is_on_cpu, dtype, reasoning_parser(load_tokenizer(folder), open_config(folder).model_type)


def _serve(models: Sequence[ServedModel], options: argparse.Namespace) -> int:
    """Start the servers, print their addresses, and wait for Ctrl-C or SIGTERM."""
    from align.inference.servers.openai_server import OpenAiServer

    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        servers: list[OpenAiServer] = []
        for number, model in enumerate(models):
            port = None if options.port is None else options.port + number
            server = stack.enter_context(OpenAiServer(model, port))
            server.wait(options.timeout, _logger(model.name))
            servers.append(server)
        _announce(servers, is_json=options.json)
        try:
            _follow(servers)
        except KeyboardInterrupt:
            print("ending the server", file=sys.stderr, flush=True)
    return 0


def _follow(servers: Sequence[OpenAiServer]) -> None:
    """Show the servers' lines until the first ends, which is an error."""
    ended: list[BaseException] = []
    stop_event = threading.Event()

    def follow(server: OpenAiServer) -> None:
        try:
            server.follow(_logger(server.model.name))
        except BaseException as error:
            ended.append(error)
            stop_event.set()

    for server in servers:
        threading.Thread(target=follow, args=(server,), daemon=True).start()
    # A wait without a limit would not let signals through.
    while not stop_event.wait(1.0):
        pass
    raise ended[0]


def _logger(name: str) -> Callable[[str], None]:
    def log(line: str) -> None:
        print(printable(f"[{name}] {line}"), file=sys.stderr, flush=True)

    return log


def _announce(servers: Sequence[OpenAiServer], *, is_json: bool) -> None:
    """Print each server's address, the names of its models, and its key, once."""
    rows: list[dict[str, Any]] = [
        {"address": server.address, "models": [server.model.name, *server.model.adapters], "key": server.key}
        for server in servers
    ]
    if is_json:
        print_json(rows)
        sys.stdout.flush()
        return
    for row in rows:
        print(printable(f"Serving {', '.join(row['models'])} at {row['address']}"))
        print(f"  export OPENAI_BASE_URL={row['address']} OPENAI_API_KEY={row['key']}")
    print("Every request needs the key. Ctrl-C ends the server.", flush=True)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the command with its servers; a shell's background job ignores SIGINT otherwise."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
