# Two commands do everything: `make serve` and `make test`. Bare `make` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
PORT ?= 8000
MODEL ?=
ARGS ?=
ROOM ?= all

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

serve: $(VENV)/.core ## install, and serve the bundled model at http://127.0.0.1:8000 (PORT=, MODEL=, ARGS=)
	@$(PY) -m whalefall serve --port $(PORT) $(if $(MODEL),--model '$(MODEL)') $(ARGS)

test: $(VENV)/.test ## install, and run the whole suite
	@$(PY) tests/run.py $(ARGS)

test-long: $(VENV)/.test ## the grids, searches and sanitizer builds that take longer
	@OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -q -m slow --timeout 3600 $(ARGS)

lint: $(VENV)/.test ## ruff, mypy, import contracts, C++ format
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports --no-cache
	@files=$$(git ls-files 'src/*.cpp' 'src/*.h'); [ -z "$$files" ] || $(VENV)/bin/clang-format --dry-run -Werror $$files

format: $(VENV)/.test ## rewrite Python and C++ sources in the house format
	@$(VENV)/bin/ruff check --fix-only -q . ; $(VENV)/bin/ruff format -q .
	@files=$$(git ls-files 'src/*.cpp' 'src/*.h'); [ -z "$$files" ] || $(VENV)/bin/clang-format -i $$files

bench: $(VENV)/.bench ## measure (ROOM=gemm, …) and renew docs/benchmarks.md
	@$(PY) -m whalefall bench $(ROOM) $(ARGS)

traces: $(VENV)/.test ## make docs/traces/ anew: a train step, a prefill and a decode step
	@$(PY) benchmarks/_traces.py $(ARGS)

docs: $(VENV)/.docs ## build the site of docs/*.md in site/, strictly: a broken link ends it
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet $(ARGS) && echo "site/index.html"

wheel-test: $(VENV)/.core ## build the wheel, install it alone, serve the bundled model from it
	@$(PIP) build && $(PY) tests/wheel.py $(ARGS)

gpu: ## on a machine with a GPU: check and time every Triton kernel, by its own python3 (torch, Triton, pytest)
	@PYTHONPATH=src:. python3 benchmarks/_gpu.py --check
	@PYTHONPATH=src:. python3 -m pytest -q -m gpu -p no:cacheprovider -o addopts='--import-mode=importlib' tests/*/test_triton.py $(ARGS)
	@PYTHONPATH=src:. python3 benchmarks/_gpu.py

$(VENV)/.python:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "whalefall needs Python 3.11 or newer as python3: apt-get install python3"; exit 2; }
	@python3 -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); echo "this Python has no venv: apt-get install python3-venv"; exit 2; }
	@command -v $${WHALEFALL_CXX:-c++} >/dev/null || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || $(PIP) ziglang || echo "no C++ compiler: models, gemm and attention will answer by the numpy reference, slowly; pip install ziglang"
	@touch $@

$(VENV)/.core: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing whalefall into $(VENV) (once)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "installing the test extra (once; the pinned torch from plain pip is a large CUDA build, see README)"
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@$(PIP) -e '.[docs]'
	@touch $@

.PHONY: help serve test test-long lint format bench traces docs wheel-test gpu
