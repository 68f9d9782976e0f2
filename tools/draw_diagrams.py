"""Draw the Mermaid diagrams of the guides as SVG files for the documentation site.

GitHub draws the diagrams from the Markdown. The site shows the files in ``docs/assets/diagrams/``, so its pages need
neither JavaScript nor a network. Run this after a change of a diagram, with ``pip install mermaidx``:

    .venv/bin/python tools/draw_diagrams.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import mermaidx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "hooks"))

from site_pages import diagrams  # noqa: E402


def main() -> None:
    """Write the files of all diagrams, and delete the files of diagrams that are gone."""
    paths = set()
    for page in sorted((ROOT / "docs").glob("*.md")):
        for source, target in diagrams(page.read_text(encoding="utf-8")):
            path = ROOT / "docs" / target
            paths.add(path)
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_text(mermaidx.render(source).svg() + "\n", encoding="utf-8")
    for path in (ROOT / "docs" / "assets" / "diagrams").glob("*.svg"):
        if path not in paths:
            path.unlink()


if __name__ == "__main__":
    main()
