"""Only ``align/patches/`` changes other packages or reads their private names."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PUBLIC_SETTINGS = {"DetectorFactory.seed", "torch.backends"}
"""Attributes of other packages that their documentation tells users to set."""
STANDARD_LIBRARY = {
    *("_exit", "_Hash", "_SubParsersAction", "_actions", "_choices_actions", "_expand_help", "_get_formatter"),
    "_option_string_actions",
}
"""Names of os, hashlib and argparse."""


def outside_names(tree: ast.Module) -> set[str]:
    """Return the names that a file imports from packages other than align and the standard library."""
    own = {"align", "typing", *sys.stdlib_module_names}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = [(node.module, alias.asname or alias.name) for alias in node.names]
        else:
            continue
        names |= {name for module, name in imported if module.split(".")[0] not in own}
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def root_of(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def own_private_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Return the private names that align's own code defines."""
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root_of(node) == "self":
                names.add(node.attr)
    return names


def violations(tree: ast.Module, own_names: set[str]) -> Iterator[str]:
    """Yield the places of a file that change another package or use a private name of one."""
    outside = outside_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_foreign = root_of(node) in outside
            is_assigned = isinstance(node.ctx, ast.Store | ast.Del) and (is_foreign or node.attr == "__class__")
            is_unknown = is_foreign or node.attr not in own_names
            if is_assigned and not any(ast.unparse(node).startswith(name) for name in PUBLIC_SETTINGS):
                yield f"{node.lineno}: assigns {ast.unparse(node)}"
            elif is_private(node.attr) and is_unknown and node.attr not in STANDARD_LIBRARY:
                yield f"{node.lineno}: uses {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] != "align":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(map(is_private, names)):
                yield f"{node.lineno}: imports from {node.module}"
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "setattr"
            and root_of(node.args[0]) in outside
        ):
            yield f"{node.lineno}: assigns by {ast.unparse(node)}"


def test_only_patches_touch_other_packages() -> None:
    paths = [path for path in sorted((ROOT / "align").rglob("*.py")) if path.parent.name != "patches"]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    own_names = own_private_names(trees)
    places = []
    for path, tree in trees.items():
        name = path.relative_to(ROOT).as_posix()
        for place in violations(tree, own_names):
            places.append(f"{name}:{place}")
    assert places == []


def test_violations_are_noticed() -> None:
    source = """
import torch
from peft import PeftModel
from vllm._custom_ops import norm
from transformers.utils import chat
torch.set_num_threads = print
chat._compile = print
PeftModel.save.inner = 1
layer.__class__ = PeftModel
setattr(PeftModel, "x", 1)
model._private = 1
torch.backends.cudnn.benchmark = True
self._mine
"""
    places = list(violations(ast.parse(source), {"_mine"}))
    assert [int(place.split(":")[0]) for place in places] == [4, 6, 7, 8, 9, 10, 11]
