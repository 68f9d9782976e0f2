"""Hooks of mkdocs: put the generated pages into the site, arrange its navigation, and write ``llms.txt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from site_pages import arrange, collect_pages, llms_txt, show_drawings, title_of

PAGES: dict[str, str] = {}
"""The pages of the build under way; mkdocs calls the hooks below in their order here."""


def on_files(files: Files, config: Any) -> Files:
    """Add every page of the site, and arrange them."""
    PAGES.clear()
    PAGES.update(collect_pages())
    for page, markdown in PAGES.items():
        existing = files.get_file_from_path(page)
        if existing is not None:
            files.remove(existing)
        files.append(File.generated(config, page, content=show_drawings(markdown)))
    config.nav = [
        {section: [{title_of(PAGES[page]): page} for page in members]} for section, members in arrange(PAGES).items()
    ]
    return files


def on_post_build(config: Any) -> None:
    """Write ``llms.txt`` and, next to every HTML page, the Markdown that it points to."""
    site = Path(config.site_dir)
    for page, markdown in PAGES.items():
        (site / page).write_text(markdown, encoding="utf-8")
    text = llms_txt(config.site_name, PAGES, config.site_url or "")
    (site / "llms.txt").write_text(text, encoding="utf-8")
