"""What is looked at before anything is submitted: commands, partitions, the store's place, each job's options."""

from __future__ import annotations

from pathlib import Path

from align.clusters.follow import NoAnswer
from align.clusters.slurm import commands
from align.config.scheduler import SlurmConfig
from align.config.validation import suggest
from align.errors import UserError

LOCAL = frozenset(
    (
        *("bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs"),
        *("rootfs", "squashfs", "tmpfs", "vfat", "xfs", "zfs"),
    )
)
"""File systems that one machine has for itself, unless it is the one that serves them to others."""


def check_cluster(blocks: dict[str, SlurmConfig], store: Path, where: str) -> None:
    """Raise ``UserError`` for what no job could do. ``blocks`` maps a YAML place to what is asked there."""
    commands.require_slurm()
    try:
        known = commands.partitions()
        for place, block in blocks.items():
            if block.partition is not None and block.partition not in known:
                raise UserError(
                    f"{where}: {place}.partition: there is no partition '{block.partition}' in this cluster."
                    f"{suggest(block.partition, known)}"
                )
        for block in blocks.values():
            _check_store(block, store)
    except NoAnswer as error:
        raise UserError(f"--on slurm: Slurm does not answer ({error}). Nothing was submitted.") from None


def _check_store(block: SlurmConfig, store: Path) -> None:
    kind = file_system(store)
    if block.shared_store or kind not in LOCAL or commands.is_this_machine_alone(block.partition):
        return
    raise UserError(
        f"{store}: the store lies on a file system of this machine alone ({kind}), which the nodes of "
        f"{'the cluster' if block.partition is None else f'partition {block.partition}'} do not see. Name a folder on "
        "a shared one with --store or runtime.store; if nodes do see it, say `runtime: {slurm: {shared_store: true}}`."
    )


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that holds ``path``, as Linux calls it; empty where it does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    best, found = -1, ""
    resolved = path.resolve()
    for line in lines:
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = words[1].encode().decode("unicode_escape")  # a space in it is written \040
        if resolved.is_relative_to(point) and len(point) >= best:  # of two at one point the later one is on top
            best, found = len(point), words[2]
    return found
