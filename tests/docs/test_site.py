"""The documentation site has every page, every stage and every field; its links hold."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from config_reference import reference_pages
from field_tables import name_with
from pydantic import BaseModel, Field
from site_pages import arrange, collect_pages, diagrams, llms_txt, rewrite_links, show_drawings, summary_of, title_of

from align.config.base import Config, stage_input
from align.config.field_descriptions import (
    describe_bounds,
    describe_default,
    describe_type,
    discriminator,
    nested_models,
)
from align.pipeline.registry import STAGES
from align.store.artifacts import Kind

ROOT = Path(__file__).parents[2]


def test_reasons_of_blocks_that_are_not_run_are_dropped(pages):
    assert 'not_run="' in (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page for page, text in pages.items() if 'not_run="' in text and page != "contributing.md"]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return collect_pages()


class Inner(Config):
    """A block."""

    kind: Literal["inner"] = "inner"
    share: float = Field(0.5, ge=0, lt=1)
    """Share of a | b."""


class Outer(Config):
    """Two blocks."""

    source: stage_input(Kind.POLICY, Kind.MODEL)
    names: dict[str, list[int]] = Field({}, max_length=3)
    inner: Inner | None = None
    mode: Literal["fast", "safe"] = "fast"
    inners: list[Annotated[Inner, Field()]] = Field(min_length=1)


def link(model: type[BaseModel]) -> str:
    return f"page.md#{model.__name__.lower()}"


def type_of(name: str) -> str:
    return describe_type(Outer.model_fields[name].annotation, name_with(link))


def test_types_are_in_the_words_of_yaml():
    assert type_of("names") == "mapping of string to list of integer"
    assert type_of("inner") == "[Inner](page.md#inner) or null"
    assert type_of("mode") == "`fast` or `safe`"
    assert type_of("inners") == "list of [Inner](page.md#inner)"


def test_bounds_and_defaults_are_those_of_the_class():
    share = Inner.model_fields["share"]
    assert describe_bounds(share) == "≥ 0, < 1"
    assert describe_default(share) == "`0.5`"
    assert describe_default(Outer.model_fields["source"]) == "required"
    assert describe_default(Outer.model_fields["names"]) == "`{}`"
    assert describe_bounds(Outer.model_fields["names"]) == "length ≤ 3"
    assert describe_bounds(Outer.model_fields["inners"]) == "length ≥ 1"
    assert discriminator(Inner) == "kind: inner"
    assert discriminator(Outer) is None


def test_every_stage_has_a_page_with_every_field():
    pages = reference_pages()
    for kind, stage in STAGES.items():
        page = pages[f"reference/stages/{kind}.md"]
        for name, field in stage.config_class().model_fields.items():
            (row,) = re.findall(rf"^\| `{name}` \|.*$", page.partition("\n## ")[2].partition("\n## ")[0], re.MULTILINE)
            assert describe_bounds(field).replace("|", "\\|") in row
            assert describe_default(field).replace("|", "\\|") in row


def test_every_field_has_a_docstring():
    """A field that only selects its block, ``method: lora``, is the heading of the block's section."""
    for page, text in reference_pages().items():
        for section in text.split("\n## ")[1:]:
            heading = section.splitlines()[0]
            for name in re.findall(r"^\| `(\w+)` \|.*\|  \|$", section, re.MULTILINE):
                selects = heading.startswith(f"{name}: ")
                assert selects, f"{page}: {heading}: {name}"


def test_every_block_below_a_stage_is_on_exactly_one_page():
    text = "\n".join(reference_pages().values())
    blocks = set()
    waiting = [stage.config_class() for stage in STAGES.values()]
    while waiting:
        model = waiting.pop()
        if model not in blocks:
            blocks.add(model)
            for field in model.model_fields.values():
                waiting.extend(nested_models(field.annotation))
    for block in blocks:
        assert text.count(f"{{#{block.__name__.lower()}}}") == 1, block


def test_block_of_several_stages_has_a_shared_page(pages):
    assert "{#gateconfig}" in pages["reference/stages/evaluate.md"]
    assert "{#lintsettings}" in pages["reference/shared.md"]
    assert "{#loratuning}" in pages["reference/tuning.md"]


def test_every_input_says_which_artifacts_it_takes(pages):
    row = next(line for line in pages["reference/stages/ppo.md"].splitlines() if line.startswith("| `reward` |"))
    assert "name of a stage that makes RewardCheckpoint" in row


def test_every_page_is_in_the_navigation_once(pages):
    navigation = [page for members in arrange(pages).values() for page in members]
    assert sorted(navigation) == sorted(pages)


def test_a_guide_that_no_section_names_is_in_the_navigation(pages):
    navigation = arrange({**pages, "a_new_guide.md": "# New"})
    assert "a_new_guide.md" in navigation["More guides"]
    assert arrange(pages)["Start"][0] == "index.md"


def test_every_guide_is_on_the_site(pages):
    guides = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert guides <= set(pages)
    assert {"index.md", "changelog.md", "development.md"} <= set(pages)


def test_llms_txt_has_a_line_for_every_page(pages):
    text = llms_txt("align", pages, "https://docs.example/")
    lines = text.splitlines()
    assert lines[0] == "# align"
    assert lines[2].startswith("> ")
    for page, markdown in pages.items():
        entries = [line for line in lines if f"](https://docs.example/{page}):" in line]
        assert len(entries) == 1, page
        assert entries[0].startswith(f"- [{title_of(markdown)}](")
        assert summary_of(markdown), f"{page} opens with no sentence"


def test_no_link_of_a_page_leads_to_a_missing_page(pages):
    for page, markdown in pages.items():
        prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#:]+\.md)(?:#[^)\s]*)?\)", prose):
            linked = (ROOT / "docs" / page).parent.joinpath(target).resolve().relative_to(ROOT / "docs").as_posix()
            assert linked in pages, f"{page}: {target}"


def test_every_page_that_code_and_documents_mention_exists():
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for folder in ("align", "tests", "benchmarks", "examples", "pipelines", "data_recipes"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".yaml")]
    for file in files:
        for mention in re.findall(r"(?<![\w/])docs/[\w/-]+\.md\b", file.read_text(encoding="utf-8")):
            assert (ROOT / mention).is_file(), f"{file.relative_to(ROOT)}: {mention}"


def test_links_of_files_hold_on_the_site():
    pages = {"index.md": "", "ppo.md": "", "decisions/0001.md": ""}
    rewrite = functools.partial(rewrite_links, pages=pages)
    assert rewrite("index.md", "[PPO](docs/ppo.md#alarms)") == "[PPO](ppo.md#alarms)"
    assert rewrite("index.md", "see `docs/ppo.md`.") == "see [`docs/ppo.md`](ppo.md)."
    assert rewrite("decisions/0001.md", "`ppo.md`") == "[`ppo.md`](../ppo.md)"
    assert rewrite("ppo.md", "`docs/ppo.md`") == "`docs/ppo.md`", "a page does not link to itself"
    assert rewrite("ppo.md", "[smoke](../pipelines/smoke.yaml)") == "smoke"
    assert rewrite("ppo.md", "[gone](gone.md)") == "[gone](gone.md)", "the strict build refuses it"
    assert rewrite("ppo.md", "[out](https://example.org/a.md)") == "[out](https://example.org/a.md)"
    code = "```\n[x](docs/ppo.md)\n```\n"
    assert rewrite("index.md", code) == code


def test_every_diagram_is_drawn_and_no_drawing_is_stale(pages):
    drawings = {path for markdown in pages.values() for _, path in diagrams(markdown)}
    files = {f"assets/diagrams/{path.name}" for path in (ROOT / "docs" / "assets" / "diagrams").iterdir()}
    assert files == drawings, "run tools/draw_diagrams.py"


def test_site_shows_drawings_with_their_titles():
    markdown = "Before.\n\n```mermaid\nflowchart LR\n  accTitle: From a to b\n  a --> b\n```\n\nAfter.\n"
    ((source, path),) = diagrams(markdown)
    assert source.endswith("a --> b\n")
    assert show_drawings(markdown) == f"Before.\n\n![From a to b]({path})\n\nAfter.\n"


def test_the_generator_needs_no_torch():
    code = "import sys, site_pages; site_pages.collect_pages(); sys.exit('torch' in sys.modules)"
    hooks = str(ROOT / "docs" / "hooks")
    environment = {"PYTHONPATH": f"{hooks}:{ROOT}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
