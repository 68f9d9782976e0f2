"""A store with a run of two policies and a reward model, all tiny and real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from align.store.leases import write_run
from align.store.store import Store
from tests.support.records import put_record
from tests.support.stages.stage_contexts import perturbed_copy

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202egpj"
VISIBLE = HOSTILE.replace("\u202e", "\\u202e")
STAGES = {"sft": ("sft", "a", "PolicyCheckpoint"), "dpo": ("dpo", "b", "PolicyCheckpoint")}
REWARD = ("reward", "c", "RewardCheckpoint")


def write_chat_store(root: Path, policy: Path, reward: Path) -> Path:
    """Write the store with the run ``smoke``; its checkpoints are copies of the models in two folders."""
    Store.open(root)
    stages: dict[str, Any] = {}
    for name, (kind, digit, makes) in {**STAGES, "reward": REWARD}.items():
        folder = root / kind / (digit * 12)
        folder.mkdir(parents=True)
        if name == "dpo":
            perturbed_copy(policy, folder / "model", 1)
        else:
            shutil.copytree(reward if name == "reward" else policy, folder / "model")
        if name == "sft":
            sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 20}
            settings = folder / "model" / "generation_config.json"
            stored = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
            settings.write_text(json.dumps(stored | sampling), encoding="utf-8")
        put_record(folder, kind=kind, stage=name, makes=makes, key=digit * 64)
        stages[name] = {"kind": kind, "key": digit * 64}
    write_run(root, "smoke", stages, {"stages": {name: {} for name in stages}})
    return root
