"""The script of a job, and sbatch's options for it.

Options go on sbatch's command line, never into the script, so that no value can be taken for another line of it. The
script holds no part of the environment: sbatch hands that on itself.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from align.config.executor import SlurmExecutor
from align.store.atomic_write import write_text_atomically

TEMPLATE = """\
#!/bin/bash
# {title}. Written by align; runs again as it stands: sbatch OPTIONS {script}
# Asked to stop before anything has begun: wait for another turn.
trap 'scontrol requeue "$SLURM_JOB_ID"; exit 75' USR1
if [ ! -d {folder} ]; then
  echo "node $(hostname) does not see the store's folder" {folder} >&2
  exit 1
fi
export PATH={bin}:"$PATH"
{setup}
# From here to Python's own handler the signal is held back, not lost; coreutils before 8.32 cannot.
trap '' USR1
block=; env --block-signal=USR1 true 2>/dev/null && block='env --block-signal=USR1'
exec $block {python} -m {module} {arguments}
"""


def write_script(
    file: Path, title: str, arguments: Sequence[str], setup: str | None, module: str = "align.cli.slurm_job"
) -> Path:
    """Write a script that runs ``module`` with ``arguments``; returns its path."""
    python = Path(sys.executable)
    write_text_atomically(
        file,
        TEMPLATE.format(
            # One line: a name with a line break must not become a command.
            title=" ".join(title.split()),
            script=shlex.quote(str(file)),
            folder=shlex.quote(str(file.parent)),
            bin=shlex.quote(str(python.parent)),
            setup=setup or "",
            python=shlex.quote(python.name),
            module=module,
            arguments=shlex.join(arguments),
        ),
    )
    return file


def sbatch_options(block: SlurmExecutor, name: str, log_folder: Path, workdir: Path, log: str) -> list[str]:
    """Return sbatch's options for a job named ``name`` that works in ``workdir``.

    It writes ``log`` into ``log_folder``. In ``log``, %a is the number of an array's task.
    """
    settings = {
        "job-name": name,
        # sbatch replaces % and a letter in this path, so a % of the folder's own is doubled.
        "output": f"{str(log_folder).replace('%', '%%')}/{log}",
        # A requeued job adds to the log of its earlier turns.
        "open-mode": "append",
        "chdir": str(workdir),
        # B: to the script's own process alone, which has become Python by ``exec``.
        "signal": f"B:USR1@{block.grace}",
        "partition": block.partition,
        "account": block.account,
        "qos": block.qos,
        "constraint": block.constraint,
        "time": block.time,
        "nodes": block.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": block.cpus,
        "mem": None if block.memory_gb is None else f"{block.memory_gb}G",
        "gpus-per-node": block.gpus or None,
        **block.sbatch,
    }
    options = []
    # None leaves an option out; the user's own ``sbatch`` settings come last and win.
    for option, value in settings.items():
        if value is not None:
            options.append(f"--{option}" if value == "" else f"--{option}={value}")
    options.append("--requeue" if block.requeue else "--no-requeue")
    return options
