"""The folder of the model that every side starts from: the embedded one with a plain chat template.

    python -m benchmarks.training_peers.model FOLDER

Its own template adds a system message to every prompt, which ``align`` reads once for a micro-batch; the template here
has none, so that no side gains from it. A conversation ends with ``<|im_end|>``, the token that a policy learns to stop
at. Torch is loaded only where the model was never converted.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}"
)
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def export_model(folder: Path) -> Path:
    """Write the model to ``folder``, once."""
    from align.models.built_in import fetch

    if (folder / "chat_template.jinja").is_file():
        return folder
    source = fetch(print)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(source / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # Last, because it marks the folder as complete.
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def render(messages: list[dict[str, str]]) -> str:
    """Return a conversation as ``CHAT_TEMPLATE`` renders it."""
    return "\n".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>" for turn in messages)


def token_counter(folder: Path) -> Any:
    """Return a function that counts the tokens of a conversation."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda messages: len(tokenizer.encode(render(messages), add_special_tokens=False).ids)


if __name__ == "__main__":
    export_model(Path(sys.argv[1]))
