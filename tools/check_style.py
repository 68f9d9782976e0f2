"""Count how the code reads, and fail if a count is over its cap. ``make check`` runs it.

``python tools/check_style.py`` prints every count; with ``--list NAME`` it prints the places of one. A cap is the level
that was reached. Lower it when the count falls; raise it only with a reason in the commit.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST_TEST_NAME = 60
LONGEST_FUNCTION = 60
IDIOMS = {
    "where for if": (r"\bwhere (there|it|the|a|an|one|they|this|no|nothing|some|several|its|none)\b", 2, 3),
    "one without a noun": (r"\bone (that|of|for|whose|in|with|which)\b", 1, 3),
    "nobody, nothing": (r"\b(nobody|nothing)\b", 3, 6),
    "takes": (r"\b(takes?|taken)\b", 3, 7),
    "that of": (r"\b(that|those) of\b", 1, 1),
    "alone": (r"\balone\b", 1, 1),
    "too": (r",? too[.,;)]", 1, 1),
    "of its own": (r"\bof (its|their) own\b", 1, 1),
    "beside": (r"\bbeside\b", 1, 1),
    "goes on": (r"\bgo(es)? on\b", 1, 1),
    "lies, stands": (r"\b(lies?|stands?)\b(?! for)", 1, 1),
    "left out": (r"\bleft out\b", 1, 1),
    "so that": (r"\bso that\b", 1, 2),
}
"""Name -> expression that is rare in technical English, and its highest rate per 10,000 words of docstrings and
comments, and of documents."""
QUESTION = re.compile(r"^(What|Whether|How|Where|Which|Who|Why|When)\b")
CAPS = {
    "files": 625,
    "functions over 60 lines": 3,
    "test names over 60 characters": 0,
    "docstrings that begin with a question word": 1,
    "circles of imports": 0,
}
"""Count -> highest number."""
SIZES = {
    "lines of core code": 82675,
    "lines of extensions' code": 6807,
    "lines of JavaScript, styles and templates": 10250,
    "lines of tests' code": 82905,
    "words of documents": 126013,
}
"""Size -> highest number, without docstrings, comments and blank lines of Python. It is only ever lowered, to what was
reached. A commit that raises it has a line in the change log that says what the user got for it."""
WEB = (".js", ".css", ".html", ".jinja")

Places = dict[str, list[str]]


def main(arguments: list[str]) -> int:
    """Print the counts; return 1 if one is over its cap."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", metavar="NAME", help="print the places of one count")
    listed = parser.parse_args(arguments).list
    places: Places = defaultdict(list)
    sources = sorted((ROOT / "align").rglob("*.py"))
    prose = [text for path in sources for text in read_source(path, places)]
    places["files"] = [str(path) for path in sources]
    places["circles of imports"] = find_circles(read_imports(sources))
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        read_test(path, places)
    documents = [(str(path), path.read_text(encoding="utf-8")) for path in sorted((ROOT / "docs").rglob("*.md"))]
    if listed is not None:
        sys.stdout.write("\n".join([*places.get(listed, []), *idiom_places(listed, prose + documents)]) + "\n")
        return 0
    lines, is_over = report(places, prose, documents)
    for name, size in measure_sizes().items():
        is_over |= size > SIZES[name]
        lines.append(f"{size:6} of at most {SIZES[name]:<6} {name}")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(is_over)


def report(places: Places, prose: list[tuple[str, str]], documents: list[tuple[str, str]]) -> tuple[list[str], bool]:
    """Return one line per count, and whether one is over its cap."""
    lines = []
    is_over = False
    for name, cap in CAPS.items():
        count = len(places[name])
        is_over |= count > cap
        lines.append(f"{count:6} of at most {cap:<5} {name}")
    for number, texts, kind in ((1, prose, "docstrings and comments"), (2, documents, "documents")):
        words = sum(len(text.split()) for _, text in texts)
        for idiom, entry in IDIOMS.items():
            highest = float(entry[number])
            rate = 10_000 * len(list(idiom_places(idiom, texts))) / max(words, 1)
            is_over |= rate > highest
            lines.append(f"{rate:6.1f} of at most {highest:<5g} {idiom}, per 10,000 words of {kind}")
    return lines, is_over


def idiom_places(name: str, texts: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the places of an idiom in ``texts``, pairs of a place and a text; none for another name."""
    if name not in IDIOMS:
        return
    pattern = re.compile(IDIOMS[name][0], re.IGNORECASE)
    for place, text in texts:
        for match in pattern.finditer(text):
            start = max(0, match.start() - 30)
            yield f"{place}: ...{' '.join(text[start : match.end() + 30].split())}..."


def measure_sizes() -> dict[str, int]:
    """Return the sizes of the code, of its tests, and of the documents."""
    package = ROOT / "align"
    code = {path: code_lines(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    extensions = sum(count for path, count in code.items() if (package / "extensions") in path.parents)
    documents = [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
    ]
    texts = [path.read_text(encoding="utf-8") for path in package.rglob("*") if path.suffix in WEB]
    return {
        "lines of core code": sum(code.values()) - extensions,
        "lines of extensions' code": extensions,
        "lines of JavaScript, styles and templates": sum(len(text.splitlines()) for text in texts),
        "lines of tests' code": sum(
            code_lines(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")
        ),
        "words of documents": sum(len(path.read_text(encoding="utf-8").split()) for path in documents if path.exists()),
    }


def code_lines(source: str) -> int:
    """Return the number of lines of Python without docstrings, comments and blank lines."""
    lines = {
        number
        for number, line in enumerate(source.splitlines(), start=1)
        if line.strip() and not line.strip().startswith("#")
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def read_source(path: Path, places: Places) -> Iterator[tuple[str, str]]:
    """Count what is long in a module, and yield its docstrings and comments with their places."""
    name = path.relative_to(ROOT).as_posix()
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                places["functions over 60 lines"].append(f"{name}:{node.lineno}: {node.name}")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = node.value.value
            if QUESTION.match(text):
                places["docstrings that begin with a question word"].append(f"{name}:{node.lineno}: {text[:60]}")
            yield f"{name}:{node.lineno}", text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield f"{name}:{token.start[0]}", token.string.lstrip("# ")


def read_imports(sources: list[Path]) -> dict[str, set[str]]:
    """Return module -> modules of the same package that it imports, type-only and late imports included.

    ``from package import name`` counts as an import of ``package.name`` if that is a module, else of ``package``. That
    a submodule also runs its package's ``__init__`` does not count.
    """
    paths = {_module_name(path): path for path in sources}
    imports: dict[str, set[str]] = {}
    for module, path in paths.items():
        imports[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported_names(node):
                # Drop the last parts until a module is left: they are names in it. Other packages have no module here.
                while name and name not in paths:
                    name = name.rpartition(".")[0]
                if name:
                    imports[module].add(name)
    return imports


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_names(node: ast.AST) -> list[str]:
    """Return the absolute names that a statement imports; ruff refuses relative imports (TID252)."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def find_circles(imports: dict[str, set[str]]) -> list[str]:
    """Return each group of modules that import each other, directly or through others, as one line."""
    reachable = {module: _reach(module, imports) for module in imports}
    circles: list[str] = []
    grouped: set[str] = set()
    for module in sorted(imports):
        # A module that reaches itself is in a circle. The modules that it reaches and that reach it are the others.
        if module in grouped or module not in reachable[module]:
            continue
        group = sorted(other for other in reachable[module] if module in reachable[other])
        grouped.update(group)
        circles.append(" <-> ".join(group))
    return circles


def _reach(start: str, imports: dict[str, set[str]]) -> set[str]:
    """Return the modules that ``start`` imports, directly or through others; ``start`` only if a way leads back."""
    reached: set[str] = set()
    pending = [start]
    while pending:
        for module in imports[pending.pop()] - reached:
            reached.add(module)
            pending.append(module)
    return reached


def read_test(path: Path, places: Places) -> None:
    """Count the names of a module's tests that are too long."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("test_") and len(node.name) > LONGEST_TEST_NAME:
            place = f"{path.relative_to(ROOT).as_posix()}:{node.lineno}: {node.name}"
            places["test names over 60 characters"].append(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
