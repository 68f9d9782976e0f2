"""Origin of a result: source digest, git commit, command line. Never imports torch."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from align import registry
from align.registry import Stage, registered

PACKAGE = Path(__file__).parents[1]
IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<module>align[\w.]*)[ \t]+import[ \t]+(?P<names>\([^)]*\)|[^\n]*)"
    r"|import[ \t]+(?P<plain>[\w., \t]+))",
    re.MULTILINE,
)
IMPORT_PATH = re.compile(r"[\"'](align(?:\.\w+)+):\w+[\"']")
"""A module and a name in it, as tables have them whose entries are imported when they are needed."""
TABLE = re.compile(r"\bregistered\((?:registry\.)?(Task|Step|Adapter)\)")
"""A look-up in a table of the registry, from which a stage runs any entry."""
COMMENT = re.compile(r"#[^\n]*")
SECRET = re.compile(r"(?i)(token|secret|password|passwd|api[_-]?key)=\S+")


@cache
def source_digest(stage: Stage) -> str:
    """Return a digest (sha256, 16 hex digits) of the stage's modules and every module of align that they import."""
    sources = stage_sources(stage)
    hasher = hashlib.sha256()
    # Sorting and separators make the digest independent of the order and of the files' boundaries.
    for module in sorted(sources):
        hasher.update(module.encode() + b"\0" + sources[module] + b"\0")
    return hasher.hexdigest()[:16]


def stage_sources(stage: Stage) -> dict[str, bytes]:
    """Return the source of the stage's modules and of every module of align that they import, by module.

    The source files are read, and no module is imported.
    """
    # Follow imports until no new module of align turns up.
    queue = [path.partition(":")[0] for path in (stage.run, stage.config)]
    sources: dict[str, bytes] = {}
    while queue:
        module = queue.pop()
        read = _read_module(module)
        # ``from align.x import y`` was noted as a module ``align.x.y``; where y is a function there is no such file.
        if read is None or module in sources:
            continue
        sources[module], imported = read
        queue += imported
    return sources


@cache  # the stages of a run share most modules
def _read_module(module: str) -> tuple[bytes, list[str]] | None:
    """Return a module's source and the modules of align that it names; None for what is no module of align."""
    path = _module_file(module)
    if path is None:
        return None
    source = path.read_bytes()
    text = source.decode()
    named = set(IMPORT_PATH.findall(text))
    for table in set(TABLE.findall(text)):
        named |= {entry.code.partition(":")[0] for entry in registered(getattr(registry, table)).values()}
    return source, sorted(find_imports(source) | named)


def _module_file(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    base = PACKAGE.joinpath(*parts[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def find_imports(source: bytes) -> set[str]:
    """Return the modules of align that import statements name, those inside functions included.

    A pattern finds them: parsing every module into a tree took a cached run four seconds.
    """
    names: set[str] = set()
    for match in IMPORT.finditer(source.decode()):
        if match["plain"]:
            names |= {part.split()[0] for part in match["plain"].split(",")}
            continue
        # `from align.x import y` may name a module y.
        listed = COMMENT.sub("", match["names"]).strip("()").split(",")
        names |= {match["module"], *(f"{match['module']}.{part.split()[0]}" for part in listed if part.strip())}
    return {name for name in names if name.split(".")[0] == PACKAGE.name}


@cache
def git_commit() -> str | None:
    """Commit of the align checkout, with ``+`` when files differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git on this package's checkout."""
    return subprocess.run(["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True, text=True, timeout=10)


def command_line() -> str:
    """Return the command that ran, without the values of secrets."""
    words = [Path(sys.argv[0]).name or "python", *sys.argv[1:]]
    return SECRET.sub(lambda match: match.group(1) + "=***", " ".join(words))
