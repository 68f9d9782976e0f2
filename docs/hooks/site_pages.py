"""Every page of the site as Markdown, its place in the navigation, and ``llms.txt``. Needs neither mkdocs nor torch.

Guides are the pages of ``docs/``; a new one appears by itself, under "More guides" until ``SECTIONS`` names it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from config_reference import reference_pages

ROOT = Path(__file__).parents[2]
COPIED = {"index.md": "README.md", "development.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files of the repository's root."""
SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": ("index", "getting_started", "concepts", "tasks", "pipelines", "python", "commands"),
    "Data": ("data", "data_*", "synthesis", "annotation", "lint"),
    "Training": ("methods*", "own_methods", "models", "thinking", "rewards", "environments", "ppo*", "rl", "rl_*"),
    "Evaluation": ("evaluation", "evaluation_*", "reporting", "export", "studio", "rollouts", "mcp"),
    "Running at scale": ("cluster", "slurm", "ray", "distributed", "scaling", "gpu"),
    "Operations": ("store", "security"),
    "Contributing": ("development", "contributing", "extending", "testing", "changelog"),
    "Measurements": ("results", "results_*", "performance", "performance_*", "faults"),
}
"""Section → patterns of page names, in order; a pattern without a page is skipped."""
FOLDERS = {"reference/": "Configuration", "api/": "Python API", "decisions/": "Decisions"}
"""Sections that hold whole folders."""
MORE = "More guides"
LINK_OR_MENTION = re.compile(
    r"""
    (!?\[(?:[^\[\]`]|`[^`]*`)*\]) \( ([^()\s]+) \)  # [text](target)
    | (?<!`) ` ([^`\s]+\.md) ` (?!`)                  # `docs/ppo.md`
    | \b docs/[\w/-]+\.md \b                         # docs/ppo.md, in a field's docstring
    """,
    re.VERBOSE,
)
SUMMARY_LENGTH = 200
NOT_RUN = re.compile(r'^(```\w+) not_run="[^"\n]*"$', re.MULTILINE)
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A diagram of Mermaid, which GitHub draws itself."""


def collect_pages() -> dict[str, str]:
    """Return every page of the site, path below ``docs/`` → Markdown, with links that hold on the site.

    Blocks of code that no test runs say why in an attribute of their fence, which mkdocs would print.
    """
    sources = {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
    texts = {page: path.read_text(encoding="utf-8") for page, path in sources.items()}
    texts |= {page: (ROOT / name).read_text(encoding="utf-8") for page, name in COPIED.items()}
    texts |= reference_pages()
    return {page: rewrite_links(page, NOT_RUN.sub(r"\1", text), texts) for page, text in texts.items()}


def arrange(pages: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the navigation: section → pages in order. Every page is in exactly one section."""
    remaining = list(pages)
    sections: dict[str, list[str]] = {}
    for section, patterns in SECTIONS.items():
        for pattern in patterns:
            matches = sorted(page for page in remaining if "/" not in page and fnmatch.fnmatch(page, f"{pattern}.md"))
            sections.setdefault(section, []).extend(matches)
            remaining = [page for page in remaining if page not in matches]
    guides = [page for page in remaining if not page.startswith(tuple(FOLDERS))]
    sections[MORE] = guides
    for folder, section in FOLDERS.items():
        sections[section] = [page for page in remaining if page.startswith(folder)]
    return {section: members for section, members in sections.items() if members}


def diagrams(markdown: str) -> list[tuple[str, str]]:
    """Return the source of each diagram of a guide, and the path of its drawing below ``docs/``.

    The path contains a digest of the source: ``tools/draw_diagrams.py`` draws a changed diagram again.
    """
    sources = DIAGRAM.findall(markdown)
    return [(source, f"assets/diagrams/{hashlib.sha256(source.encode()).hexdigest()[:12]}.svg") for source in sources]


def show_drawings(markdown: str) -> str:
    """Return a guide with its diagrams as pictures. A strict build refuses a picture that does not exist."""
    for source, path in diagrams(markdown):
        title = re.search(r"accTitle: (.+)", source)
        alternative = title.group(1) if title else "diagram"
        markdown = markdown.replace(f"```mermaid\n{source}```", f"![{alternative}]({path})")
    return markdown


def title_of(markdown: str) -> str:
    """Return a page's first heading, without markup."""
    match = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    return match.group(1).replace("`", "") if match else "Untitled"


def summary_of(markdown: str) -> str:
    """Return the first sentence of a page's first paragraph, without markup."""
    for block in re.split(r"\n\s*\n", _without_code_blocks(markdown)):
        text = re.sub(r"\s+", " ", block).strip()
        text = re.sub(r"^\*\*\w+\.\*\* ", "", text)  # older decisions open with "**Context.**"
        if text and not text.startswith(("#", "|", "- ", "* ", ">", ":::", "<")):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("**", "")
            sentence = re.split(r"(?<=[.!?])\s", text)[0].rstrip(":")
            return sentence if len(sentence) <= SUMMARY_LENGTH else f"{sentence[:SUMMARY_LENGTH].rstrip()}…"
    return ""


def llms_txt(name: str, pages: Mapping[str, str], address: str = "") -> str:
    """Return ``llms.txt`` (llmstxt.org): the project's name, its summary, and a line with a link for every page.

    ``address`` is put before every link; by default links are relative to the file.
    """
    lines = [f"# {name}", f"> {summary_of(pages['index.md'])}"]
    for section, members in arrange(pages).items():
        entries = [f"- [{title_of(pages[page])}]({address}{page}): {summary_of(pages[page])}" for page in members]
        lines += [f"## {section}", "\n".join(entries)]
    return "\n\n".join(lines) + "\n"


def rewrite_links(page: str, markdown: str, pages: Mapping[str, str]) -> str:
    """Make links of files hold on the site, and mentions of pages (``docs/ppo.md``) links.

    A link to a file that is in the repository but not on the site becomes its text. One to nothing stays as it is, so
    that the strict build refuses it.
    """
    origin = COPIED.get(page, f"docs/{page}")
    files = {f"docs/{name}": name for name in pages} | {file: name for name, file in COPIED.items()}

    def site_path(target: str) -> str | None:
        path, hash_sign, fragment = target.partition("#")
        for base in (posixpath.dirname(origin), "", "docs"):
            name = files.get(posixpath.normpath(posixpath.join(base, path)))
            if name is not None:
                return posixpath.relpath(name, posixpath.dirname(page) or ".") + hash_sign + fragment
        return None

    def replace(match: re.Match[str]) -> str:
        text, target, code = match.groups()
        if text is None:
            mention = code or match.group()
            path = site_path(mention)
            is_self = path is None or posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) == page
            return match.group() if is_self else f"[`{mention}`]({path})"
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path = site_path(target)
        if path is not None:
            return f"{text}({path})"
        file = ROOT / posixpath.dirname(origin) / target.partition("#")[0]
        return text.strip("![]") if file.exists() else match.group()

    return "".join(
        part if is_code else LINK_OR_MENTION.sub(replace, part) for part, is_code in _split_code_blocks(markdown)
    )


def _split_code_blocks(markdown: str) -> Iterator[tuple[str, bool]]:
    """Yield the text in and between fenced code blocks, in order, with a flag for code."""
    lines: list[str] = []
    fence = ""
    for line in markdown.splitlines(keepends=True):
        marker = re.match(r"\s*(`{3,}|~{3,})", line)
        if marker and not fence:
            yield "".join(lines), False
            lines, fence = [line], marker.group(1)
        elif marker and marker.group(1).startswith(fence) and line.strip() == marker.group(1):
            yield "".join([*lines, line]), True
            lines, fence = [], ""
        else:
            lines.append(line)
    yield "".join(lines), bool(fence)


def _without_code_blocks(markdown: str) -> str:
    return "".join(part for part, is_code in _split_code_blocks(markdown) if not is_code)
