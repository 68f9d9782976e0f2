"""Checks before anything is submitted: Slurm's commands, the partitions, the store's file system."""

from __future__ import annotations

import re
from pathlib import Path

from align.clusters.follow import SchedulerError
from align.clusters.slurm import commands
from align.config.executor import SlurmExecutor
from align.config.validation import suggest
from align.errors import UserError

LOCAL = frozenset(
    (
        *("bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs"),
        *("rootfs", "squashfs", "tmpfs", "vfat", "xfs", "zfs"),
    )
)
"""File systems of one machine alone, unless it serves them to others."""
ESCAPED = re.compile(r"\\(040|011|012|134)")
"""Characters that Linux escapes in a mount point: space, tab, line break, backslash."""


def check_cluster(blocks: dict[str, SlurmExecutor], store: Path, where: str) -> None:
    """Raise ``UserError`` for settings that no job could use. ``blocks`` maps a place in the YAML to its settings."""
    commands.require_slurm()
    try:
        # An unknown partition would fail in sbatch as well, but without the nearest name.
        known = commands.partitions()
        for place, block in blocks.items():
            # For sbatch, ``gpu,cpu`` is the one of the two that starts the job first.
            for partition in [] if block.partition is None else block.partition.split(","):
                if partition not in known:
                    raise UserError(
                        f"{where}: {place}.partition: there is no partition '{partition}' in this cluster."
                        f"{suggest(partition, known)}"
                    )
        for block in blocks.values():
            _check_store(block, store)
    except SchedulerError as error:
        raise UserError(f"executor slurm: Slurm does not answer ({error}). Nothing was submitted.") from None


def _check_store(block: SlurmExecutor, store: Path) -> None:
    kind = file_system(store)
    # A store on a local disk is fine where the only node is this machine.
    if block.shared_store or kind not in LOCAL or commands.is_this_machine_alone(block.partition):
        return
    nodes = "the cluster" if block.partition is None else f"partition {block.partition}"
    raise UserError(
        f"{store}: the store is on a local file system ({kind}), which the nodes of {nodes} do not see. Name a folder "
        "on a shared one with --store or runtime.store; if nodes do see it, say `runtime: {executor: {name: slurm, "
        "shared_store: true}}`."
    )


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system that holds ``path``, as Linux calls it; empty where it does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    # A path lies on the file system with the longest mount point above it.
    longest, kind = -1, ""
    resolved = path.resolve()
    for line in lines:
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = ESCAPED.sub(lambda match: chr(int(match[1], 8)), words[1])
        if resolved.is_relative_to(point) and len(point) >= longest:  # of two at one point the later one is on top
            longest, kind = len(point), words[2]
    return kind
