"""A process that has imported torch, transformers and trl, and forks the processes of stages from itself.

Those imports last five to seven seconds, and a run has them once for each stage that loads a model. Here it has them
once, during its first stage. ``python -m align.runner.fork_server SOCKET RUNNER THREADS MODULE...`` serves the process
RUNNER at the other end of the socket: it imports the modules, says ``ready``, then reads one message per stage: its
folder and the variables of its environment that are not the server's, with two file descriptors, the log and a pipe.
The stage's process writes ``pid NUMBER`` to the pipe, and the server adds ``exit CODE`` when it has ended.

Another message asks for a branch: a fork that also imports vLLM, and serves stages that sample at a second socket.
vLLM needs five seconds more, which a stage that trains would only wait for.

The server holds no model and no threads that work, so a fork loses no state. It ends if there is an
accelerator, whose driver does not survive a fork: stages are then started as ever (``stage_process.py``).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from align.pipeline.process_limits import relax_collections
from align.pipeline.stop_signal import die_with_parent
from align.runner import worker

READY = b"ready"


def main(descriptor: int, runner: int, threads: int, modules: Sequence[str]) -> int:
    """Serve until the runner closes its end; in a forked process, run the stage and return its exit code.

    ``threads``: of each stage; 0 for this process's share of the cores.
    """
    die_with_parent(runner)
    with socket.socket(fileno=descriptor) as control:
        if not preload(threads, modules):
            return 0
        with contextlib.suppress(OSError):  # the runner has ended meanwhile
            control.sendall(READY)
        folder = serve(control)
    # In a fork, the stage begins only here: the loop of the server is left and its socket is closed.
    return 0 if folder is None else run_stage(folder)


def preload(threads: int, modules: Sequence[str]) -> bool:
    """Import what stages need; return whether a process with it can be forked."""
    worker.end_without_teardown()
    relax_collections()
    # Libraries read the number of threads when they are imported: it is the same for all stages of a server.
    worker.set_threads(threads)
    for name in modules:
        imported = importlib.import_module(name)
        if name == "torch" and imported.accelerator.is_available():
            return False
    # Objects that are never walked again stay in memory pages that all forks share.
    gc.collect()
    gc.freeze()
    return True


def serve(control: socket.socket) -> str | None:
    """Fork a process per message; return its folder in that process, and None here once the runner is gone."""
    statuses: dict[int, int] = {}  # descriptor of a process (pidfd) -> its pipe to the runner
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                # 1. A stage's process has ended: pass its exit code on.
                if key.fd in statuses:
                    selector.unregister(key.fd)
                    _report_end(key.fd, statuses.pop(key.fd), key.data)
                    continue
                # 2. A message is one process to fork. An empty one says that the runner has closed its end.
                message, descriptors, _, _ = socket.recv_fds(control, 65536, 2)
                if not message:
                    return None
                order = json.loads(message)
                server = os.getpid()
                pid = os.fork()
                if pid == 0:
                    # First of all, because for the runner the end of the server is also the end of the stage.
                    die_with_parent(server)
                    # The server's files are closed, so processes that wait for its end notice it.
                    for handle in (*statuses, *statuses.values()):
                        os.close(handle)
                    if "branch" in order:
                        control.close()
                        return _serve_branch(socket.socket(fileno=descriptors[0]), order["branch"])
                    _become_stage(descriptors[0], descriptors[1], order["environment"])
                    return str(order["folder"])
                if "branch" in order:
                    # The branch has the socket now, and ends once the runner closes its end. Nobody waits for it.
                    os.close(descriptors[0])
                    continue
                # 3. The log is the stage's. The pipe stays open here for the exit code.
                log, status = descriptors
                os.close(log)
                # A pidfd is readable once its process has ended, so one select waits for runner and stages.
                process = os.pidfd_open(pid)
                statuses[process] = status
                selector.register(process, selectors.EVENT_READ, pid)


def _serve_branch(control: socket.socket, importer: str) -> str | None:
    """Call ``importer`` (``module:name``), then serve the runner at another socket as ``serve`` does."""
    module, _, name = importer.partition(":")
    with control:
        try:
            getattr(importlib.import_module(module), name)()
        except Exception:  # it is never ready: a stage that imports vLLM itself says what is wrong
            return None
        gc.collect()
        gc.freeze()
        with contextlib.suppress(OSError):  # the runner has ended meanwhile
            control.sendall(READY)
        return serve(control)


def _report_end(process: int, status: int, pid: int) -> None:
    """Write the exit code of a process that has ended: negative for a signal, as in ``subprocess``."""
    _, code = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # the runner no longer asks
        os.write(status, f"exit {os.waitstatus_to_exitcode(code)}\n".encode())
    os.close(process)
    os.close(status)


def _become_stage(log: int, status: int, environment: dict[str, str | None]) -> None:
    """Lead a session of this process's own, as a stage's process does, and write to its log."""
    os.setsid()
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    # Only now: a runner that knows the id may signal the process group.
    os.write(status, f"pid {os.getpid()}\n".encode())
    os.close(status)


def run_stage(folder: str) -> int:
    """Run the stage laid out in ``folder`` as ``python -m align.runner.worker FOLDER`` does."""
    sys.argv = [str(Path(worker.__file__)), folder]
    with contextlib.suppress(ImportError):  # it comes with vLLM
        # ``ps`` and ``pgrep`` tell stages apart by their folder.
        importlib.import_module("setproctitle").setproctitle(f"python -m align.runner.worker {folder}")
    # Where the server has ended meanwhile, this process has as well.
    return worker.start([folder], parent=os.getppid())


if __name__ == "__main__":
    numbers, modules = sys.argv[1:4], sys.argv[4:]
    sys.exit(main(int(numbers[0]), int(numbers[1]), int(numbers[2]), modules))
