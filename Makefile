# Every target makes the environment it needs. PIP_ARGS is passed to pip:
#   make test PIP_ARGS="--index-url ... "     another package index
#   make test PIP_ARGS="--no-build-isolation" and so on
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
PY := $(BIN)/python
READY := .venv/ready
HTML := _build/html
# One thread a process: two workers with all cores each run several times slower.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg
export COMPANION_PROGRESS ?= 0
export PYTHONHASHSEED ?= 0

.PHONY: help env book serve test check lint unit notebooks notebooks-test site-test test-full students new-chapter bench clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | column -t -s "$$(printf '\t')"

env: $(READY) ## the environment, in .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

book: $(READY) ## build the site
	$(PY) tools/site.py build

serve: book ## build the site and serve it on localhost:8000
	$(PY) -m http.server --bind 127.0.0.1 --directory $(HTML) $(or $(PORT),8000)

test: check notebooks-test site-test ## everything CI runs

check: lint unit ## lint, unit tests, doctests

lint: $(READY) ## ruff, and the pairs of chapters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PY) tools/pairs.py check

unit: $(READY) ## unit tests and doctests
	$(PY) -m pytest -q -n $(WORKERS) --doctest-modules -m "not slow and not site and not browser" tests companion

notebooks: $(READY) ## execute what is stale, in parallel
	$(PY) tools/execute.py --jobs $(WORKERS)

notebooks-test: $(READY) ## run every notebook; COMPANION_SEED=7 runs them with another base seed
	$(PY) -m pytest -q --nbval-lax --nbval-current-env -n $(WORKERS) --dist loadfile book

site-test: book ## links, pages and browser
	$(PY) -m pytest -q -m "(site or browser) and not slow" tests

test-full: test ## the slow matrix too
	$(PY) -m pytest -q -n $(WORKERS) -m slow tests
	COMPANION_SEED=7 $(MAKE) notebooks-test

students: $(READY) ## the chapters without their solutions, to hand out
	$(PY) tools/students.py

new-chapter: $(READY) ## theme=... name=...: text, module, test and register file
	$(PY) tools/new_chapter.py "$(theme)" "$(name)"

bench: $(READY) ## side by side with the libraries people would otherwise pick
	PIP_ARGS='$(PIP_ARGS)' $(PY) benchmarks/run.py

clean: ## everything made, the environment included
	rm -rf .venv benchmarks/.venv _build .pytest_cache .ruff_cache *.egg-info
	rm -rf book/reference/api book/reference/papers.md book/reference/claims.md book/reference/bibliography.md book/reference/references.bib
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
