"""A bare adapter and the base it belongs to, by digest. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

from align.checks.facts import FILE, read_json
from align.checks.faults import Fault
from align.checks.weights import read_tensors, weights_digest

BASE = "base_weights"


def note_base(adapter: Path, base: Path) -> None:
    """Write down, in the adapter's folder, the digest of the weights it was trained on."""
    whole = read_json(adapter / FILE) | {BASE: weights_digest(read_tensors(base))}
    (adapter / FILE).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def has_base(adapter: Path) -> bool:
    """Whether that is written down."""
    return isinstance(read_json(adapter / FILE).get(BASE), str)


def check_base(adapter: Path, base: Path) -> list[Fault]:
    """The fault of merging an adapter onto weights it was not trained on; none where nothing was written down."""
    wanted = read_json(adapter / FILE).get(BASE)
    if not isinstance(wanted, str) or weights_digest(read_tensors(base)) == wanted:
        return []
    return [Fault("adapter-base", str(adapter), f"was trained on other weights than those of {base}")]
