"""Faults of checkpoints: name, problem, remedy. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from align.config.faults import REMEDIES
from align.errors import UserError


@dataclass(frozen=True)
class Fault:
    """One fault of a checkpoint; ``place`` is a folder or a config field, ``problem`` continues the sentence."""

    name: str
    place: str
    problem: str

    def text(self) -> str:
        """Return one sentence with its remedy."""
        return f"{self.name}: {self.place} {self.problem}. {REMEDIES[self.name]}"


def refuse(stage: str, faults: Iterable[Fault], waived: Iterable[str] = (), *, waivable: bool = True) -> None:
    """Raise ``UserError`` with every fault that is not ``waived``; with ``waivable`` the message shows how."""
    waived_names = set(waived)
    remaining = [fault for fault in faults if fault.name not in waived_names]
    if not remaining:
        return
    lines = [f"{stage}: its checkpoints cannot be used.", *(f"  {fault.text()}" for fault in remaining)]
    if waivable:
        names = ", ".join(dict.fromkeys(fault.name for fault in remaining))
        lines.append(f"An intended difference can be waived: `runtime: {{handover: {{waive: [{names}]}}}}`.")
    raise UserError("\n".join(lines))
