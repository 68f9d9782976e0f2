"""The faults of a hand-over: name, what is wrong, what to do. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from align.config.faults import REMEDIES
from align.errors import UserError


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a hand-over: ``place`` is a folder or a config field."""

    name: str
    place: str
    found: str

    def text(self) -> str:
        """One sentence with its remedy."""
        return f"{self.name}: {self.place} {self.found}. {REMEDIES[self.name]}"


def refuse(stage: str, faults: Iterable[Fault], waived: Iterable[str] = (), *, waivable: bool = True) -> None:
    """``UserError`` with every fault that is not ``waived`` by name; ``waivable`` says how that is done."""
    left = [fault for fault in faults if fault.name not in set(waived)]
    if not left:
        return
    names = ", ".join(dict.fromkeys(fault.name for fault in left))
    raise UserError(
        "\n".join([
            f"{stage}: what it is handed cannot be used.",
            *(f"  {fault.text()}" for fault in left),
            *([f"What is meant can be waived: `runtime: {{handover: {{waive: [{names}]}}}}`."] if waivable else []),
        ])
    )  # fmt: skip
