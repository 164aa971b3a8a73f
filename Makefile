# The commands of this repository. Plain `make` lists them.
#
# Two set-ups: .venv/.base holds what modalora needs to run, .venv/.ready adds training and development. Each is made
# once and again when pyproject.toml or constraints.txt change. PIP_FLAGS goes to every pip call, for instance another
# index with smaller torch wheels for machines without a GPU.

PYTHON ?= python3
PIP_FLAGS ?=
DATA ?= ../shared/data
THREADS ?= 0

RECIPES := src/modalora/recipes
STAGES := $(notdir $(basename $(sort $(wildcard $(RECIPES)/nano-*.yaml))))
PIP = .venv/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

# glibc gives buffers of more than 128 kB back to the system when they are freed, so that every training step maps and
# clears its activations anew. Kept instead, they save 15 % of the time (docs/log.md). Elsewhere the names mean nothing.
KEEP_BUFFERS := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456

.PHONY: help demo test check nano folds bench clean $(STAGES)
.DEFAULT_GOAL := help

help:  ## this list
	@echo "make TARGET, where TARGET is"
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r name does; do \
		printf '  %-6s  %s\n' $$name "$$does"; done

demo: .venv/.base  ## the bundled model on bundled text, image and sound
	@echo "== demo: .venv/bin/modalora demo"
	@.venv/bin/modalora demo

test: .venv/.ready  ## every test
	@echo "== test: pytest, one process on each core (at most 8)"
	@.venv/bin/pytest -q -n logical --maxprocesses 8 --dist worksteal

check: .venv/.ready  ## format, lint, types, layers, spelling
	@echo "== check: format"
	@.venv/bin/ruff format --check .
	@echo "== check: lint"
	@.venv/bin/ruff check .
	@echo "== check: types"
	@.venv/bin/mypy
	@echo "== check: who imports whom"
	@.venv/bin/lint-imports
	@echo "== check: spelling"
	@.venv/bin/codespell

nano: $(STAGES)  ## train the bundled model from DATA=../shared/data (docs/nano.md)
	@echo "== nano: once more through the stages of the paper, chain-nano"
	@$(KEEP_BUFFERS) .venv/bin/modalora train chain-nano language-1-pretrain.init=runs/nano/6b-vision/model data=$(DATA) \
		threads=$(THREADS)
	@rm -rf src/modalora/bundled/nano && cp -r runs/chain-nano/joint-asked-aloud/model src/modalora/bundled/nano
	@echo "== nano: all stages are done; the last model is now src/modalora/bundled/nano"

SPEAKERS := george jackson lucas nicolas

folds: .venv/.ready  ## speech once per left-out speaker, for the table of make bench
	@for speaker in $(SPEAKERS); do \
		echo "== folds: without $$speaker"; \
		$(KEEP_BUFFERS) .venv/bin/modalora train $(RECIPES)/fold-1-ears.yaml data=$(DATA) threads=$(THREADS) \
			mixture.0.options.without=$$speaker mixture.1.options.without=$$speaker \
			output=runs/folds/$$speaker/ears && \
		$(KEEP_BUFFERS) .venv/bin/modalora train $(RECIPES)/fold-2-speech.yaml data=$(DATA) threads=$(THREADS) \
			mixture.0.options.without=$$speaker take="{decoder: bundled/nano, audio.encoder: runs/folds/$$speaker/ears/model}" \
			output=runs/folds/$$speaker/speech || exit 1; \
	done

# A stage waits for those whose models its recipe names. On two cores `make -j2 nano THREADS=1`, two at a time, ends sooner.
$(foreach stage,$(STAGES),$(eval $(stage): \
	$(shell grep -oh 'runs/nano/[0-9a-z-]*/model' $(RECIPES)/$(stage).yaml | cut -d/ -f3 | sort -u | sed 's/^/nano-/')))

$(STAGES): .venv/.ready
	@echo "== nano: stage $@ from $(DATA)"
	@$(KEEP_BUFFERS) .venv/bin/modalora train $(RECIPES)/$@.yaml data=$(DATA) threads=$(THREADS)

bench: .venv/.ready  ## measure the bundled model: the table of the README
	@echo "== bench: benchmarks/nano.py on $(DATA)"
	@MODALORA_DATA=$(DATA) .venv/bin/python benchmarks/nano.py

clean:  ## remove builds and caches; keeps .venv and runs
	@echo "== clean: builds and caches"
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "modalora needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
			"name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== set-up: .venv with $$($(PYTHON) --version), torch and modalora"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) -e .
	@touch $@

.venv/.ready: .venv/.base
	@echo "== set-up: what training, tests and checks need"
	@$(PIP) -e '.[train,eval,science,track,dev]'
	@touch $@
