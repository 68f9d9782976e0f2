"""Fixtures every test may use: a two-layer model, a two-layer reward model, and the real data where it is present."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import shlex
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.environment import remember_environment, restore_environment
from tests.support.installed import installed_align as installed_align
from tests.support.refusals import Refused
from tests.support.s3_server import KEY, NAMES, SECRET, Server

# Property tests try the same cases every time; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
# Nothing in the default run may reach the network, whatever the caller's environment says.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two-layer models are faster on one thread, and threads that spin starve the processes which tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The same pages in every process, so that no stage's environment depends on a measurement.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
# accelerate sets this when it is imported. Now it is the same in every process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# The key of stand-ins for vLLM's servers, which tests reach by address (tests/support/inference/fake_server.py).
os.environ.setdefault("ALIGN_SERVER_KEY", "the-key-of-stand-ins-for-servers")
# Processes that tests start import `tests.support` and this checkout's `align` from any folder.
REPOSITORY = Path(__file__).resolve().parents[1]
SEARCH_PATH = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(REPOSITORY), *SEARCH_PATH]))
remember_environment()

BUCKETS = itertools.count()
LONGEST = (
    "inference/servers/test_server_vllm.py",
    "rl/test_learning.py",
    "rl/objectives/test_trainers.py",
    "test_end_to_end.py",
    "stages/test_ppo_engine_lost.py",
    "rl/test_trainer.py",
    "training/test_distributed.py",
    "training/test_resume.py",
    "stages/test_preference.py",
    "lint/test_faults.py",
    "pipeline/test_shipped_files.py",
    "training/test_unfreezing.py",
    "training/test_kept_state.py",
    "training/test_inserted_tunings.py",
    "training/test_aimed_kills.py",
    "runner/test_runner.py",
    "cli/test_export.py",
    "rl/test_episodes.py",
    "report/test_browser.py",
    "cli/test_report.py",
    "clusters/slurm/test_run.py",
    "models/tuning/test_merged_weights.py",
    "cli/test_main.py",
    "rl/test_checkpoint.py",
    "extensions/sweep/test_worker.py",
    "rl/test_aimed_kills.py",
    "runner/test_continued_run.py",
    "runner/test_shared_store.py",
    "store/test_remote.py",
    "rl/test_simulated_user.py",
    "inference/test_watchdog.py",
    "models/chat/test_chat_template.py",
    "cli/test_init.py",
    "store/test_leases.py",
    "data/builds/test_build.py",
    "runner/test_stage_process.py",
    "evaluation/lm_eval/test_task.py",
    "rl/test_prefetch.py",
    "store/test_damaged_store.py",
    "training/test_replay.py",
    "stages/test_data.py",
    "stages/test_reward_objectives.py",
    "capacity/test_memory.py",
    "training/test_anchoring.py",
)
"""The files that take longest, the longest first."""
PRELOADED: pytest.StashKey[Any] = pytest.StashKey()
WORKER_INPUT = "preloaded_python"
"""Key of its address in what pytest-xdist hands to a process."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Fork pytest's processes from one that has imported torch, transformers and trl."""
    from align.runner.fork_server import ForkServer
    from tests.support.preloaded_server import PreloadedPython, preloaded_command

    if not ForkServer.is_possible() or any(not spec.popen or spec.python for spec in specs):
        return
    server = config.stash[PRELOADED] = PreloadedPython()
    config.add_cleanup(server.close)
    command = shlex.join(preloaded_command(server.address))
    specs[:] = [type(spec)(f"{spec}//id={spec.id}//python={command}") for spec in specs]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each of these processes where that one is."""
    server = node.config.stash.get(PRELOADED, None)
    node.workerinput[WORKER_INPUT] = server and server.address


def pytest_configure(config: pytest.Config) -> None:
    """Have the fork servers of one of these processes come from there, too."""
    address = getattr(config, "workerinput", {}).get(WORKER_INPUT)
    if address is not None:
        from tests.support.fork_server import use_preloaded

        use_preloaded(address)


def slow_tests() -> set[str]:
    """Return the ids in ``slow_tests.txt``: they cost much, and others run every line that they run."""
    lines = (REPOSITORY / "tests" / "slow_tests.txt").read_text(encoding="utf-8").splitlines()
    return {line for line in lines if not line.startswith("#")}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of ``slow_tests.txt``, and start the longest files first.

    No process is then left with a long file when the others are done.
    """
    slow = slow_tests()
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    places = {REPOSITORY / "tests" / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import and collect without looking for garbage: each search walks every object of torch and transformers."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Take back what imports of test modules have set, such as lm-eval's variable: stages could not be forked."""
    restore_environment()


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Keep what earlier files imported out of garbage collections.

    A collection walks every object of torch, transformers and trl, which takes a second, and each training run on the
    two-layer model asks for several. Garbage is collected first, so that none of it is frozen.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def cached_package_lookups() -> None:
    """Have accelerate read the metadata of a package once: it does so thrice a training step, for 3 ms each time."""
    imports = sys.modules.get("accelerate.utils.imports")
    if imports is not None and not hasattr(imports._is_package_available, "cache_clear"):
        imports._is_package_available = functools.cache(imports._is_package_available)


@pytest.fixture(scope="module", autouse=True)
def environment_as_at_the_beginning() -> Iterator[None]:
    """Take back what a file's fixtures have left in the environment, or the libraries that they imported."""
    yield
    restore_environment()


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Take back the variables that a stage or an engine in this process has set, such as the number of threads.

    A later stage in a process of its own would get them, and could not be forked.
    """
    current = "PYTEST_CURRENT_TEST"
    before = {name: value for name, value in os.environ.items() if name != current}
    yield
    for name in os.environ.keys() - before.keys() - {current}:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """Fork stages from a server of this test process: those of runs in which one loads a model, and those of others.

    It starts with the first such run and the environment that the tests began with. A stage whose environment a test
    has changed is started by the interpreter.
    """
    from align.runner import runner
    from align.runner.fork_server import ForkServer
    from align.runner.stage_process import this_thread
    from tests.support.fork_server import close_shared_servers, server_without_torch, shared_server

    def use_server(pipeline: Any, nodes: list[Any]) -> contextlib.nullcontext[None]:
        # Linux ends a server with the thread that has started it.
        is_possible = ForkServer.is_possible() and threading.current_thread() is threading.main_thread()
        if is_possible:
            loads_models = any(node.stage.estimator is not None for node in nodes)
            this_thread.server = shared_server() if loads_models else server_without_torch()
        return contextlib.nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_forked_stages", use_server)
        yield
    close_shared_servers()
    this_thread.server = None


@pytest.fixture(scope="module")
def stages_in_process() -> Iterator[None]:
    """Run the stages of a file's pipelines in this process, which has torch and transformers already."""
    from tests.support import in_process

    with in_process.stages():
        yield


@pytest.fixture
def refused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Refused:
    """Call what must raise, and compare its message with the one in ``tests/messages.txt``."""
    return Refused(request.node.nodeid, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer causal model with a byte tokenizer; read-only by agreement."""
    from align.models.built_in import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer reward model with the same tokenizer; read-only by agreement."""
    from align.models.built_in import make_tiny_reward

    return make_tiny_reward(tmp_path_factory.mktemp("tiny_reward") / "model")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: ``$ALIGN_DATA``, or ``shared/data`` beside the repository."""
    named = os.environ.get("ALIGN_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set $ALIGN_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that speaks S3; its clients' variables are in the environment."""
    before = {name: os.environ.get(name) for name in NAMES}
    from tests.support import s3_server

    folder = tmp_path_factory.mktemp("s3")
    patched = pytest.MonkeyPatch()
    ports = s3_server._free_ports

    def known(count: int) -> list[int]:
        result = ports(count)
        for name, value in zip(NAMES, (KEY, SECRET, "us-east-1", f"http://127.0.0.1:{result[3]}"), strict=True):
            os.environ[name] = value
        return result

    patched.setattr(s3_server, "_free_ports", known)
    started = Server(folder)
    yield started
    started.stop()
    patched.undo()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def address(server: Server) -> str:
    """An address on it that no other test has."""
    return f"s3://tests/project {next(BUCKETS)}/store"
