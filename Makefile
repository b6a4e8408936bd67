# Needs make and Python 3.11, 3.12 or 3.13, nothing else. Everything it installs goes into .venv, in the versions that
# requirements.lock names, except the converted built-in models, which go into the user's cache folder.

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
LOG   := $(VENV)/pip.log
# Twice quiet: errors only. Once still prints a warning per package where a configured index lacks it. The log has all.
PIP   := PIP_PROGRESS_BAR=off $(BIN)/python -m pip --disable-pip-version-check -qq --log $(LOG)

# Candidates are run, not just looked up: version managers leave launchers for Pythons that are not active.
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
SUITED  := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# A .venv is of use if its Python still is the one it was made with (another one does not see its pip), and the one that
# was asked for. Once ready it must not have moved either: its commands and the package are found by the folder's name.
WHOLE   := import sys; from importlib.util import find_spec; \
           sys.exit(not (3, 11) <= sys.version_info < (3, 14) or find_spec("pip.__main__") is None)
is_asked := $(if $(PYTHON),$(shell [ "$$($(PYTHON) --version 2>&1)" = "$$($(BIN)/python --version 2>&1)" ] && echo yes),yes)
is_whole := $(if $(is_asked),$(shell $(BIN)/python -c '$(WHOLE)' 2>/dev/null && echo yes))
ifneq ($(is_whole) $(file < $(READY)),yes $(CURDIR))
.PHONY: $(READY)
endif

# What is wrong when pip fails, and what to do: pip itself says of a network that is down what it says of a missing release.
define EXPLAIN
	if grep -qE "NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable" $(LOG); then \
	    echo "No network: pip could not reach its package index. Connect (or set PIP_INDEX_URL to a mirror that can be" \
	         "reached), then run: make setup" >&2; \
	elif lacking=$$(sed -nE 's/.*\((constraint)\) ([^ ]+).*|.*No matching distribution found for ([^ ]+).*/\2\3/p' $(LOG) | sort -u | xargs); \
	    [ -n "$$lacking" ]; then \
	    echo "The package index lacks a release that requirements.lock names, for $$($(BIN)/python --version): $$lacking." >&2; \
	    echo "Set PIP_INDEX_URL to an index that has it, and run: make setup. Or let the lock name releases that yours" \
	         "has, which also helps where pyproject.toml asks for another release: make lock && make setup" >&2; \
	else \
	    echo "pip failed; all it said is in $(LOG). To start over: rm -rf $(VENV) && make setup" >&2; \
	fi; exit 1
endef

# smollm2 first: tests need it, and demo, examples and new stores take it where the other one cannot be had.
define PREPARE
	echo "$(1)Preparing the built-in models, smollm2 and qwen-0.5b (downloads of 98 MB and 491 MB, once)"; \
	$(BIN)/kv-memory models --prepare smollm2 >> $(LOG) 2>&1 || \
	    echo "WARNING: smollm2 could not be prepared; see the end of $(LOG). Setup goes on; tests that need it skip." \
	         "To try again: $(BIN)/kv-memory models --prepare smollm2" >&2; \
	$(BIN)/kv-memory models --prepare qwen-0.5b >> $(LOG) 2>&1 || \
	    echo "qwen-0.5b could not be prepared (see the end of $(LOG)), so demo, examples and new stores take smollm2." \
	         "To try again: $(BIN)/kv-memory models --prepare qwen-0.5b" >&2
endef

.PHONY: help setup venv models lock demo test stress check oldest newest bench adapter services

help:
	@echo "make setup   create $(VENV), install what requirements.lock names, prepare the built-in models"
	@echo "make models  prepare the built-in models again, where setup could not"
	@echo "make demo    compress descriptions of packages, and ask questions about them whose answers are known"
	@echo "make test    run the tests on two cores (TESTERS=2); ARGS=\"-k store\" passes arguments to pytest"
	@echo "make check   formatting, lint, plain English, imports, types"
	@echo "make oldest  run the tests on the lowest releases that pyproject.toml admits, in .nox (many minutes)"
	@echo "make newest  run the tests on the newest ones, and list what they deprecate (many minutes)"
	@echo "make lock    choose the newest releases again and write them to requirements.lock"
	@echo "make stress  kill, damage and race the store on SQLite, PostgreSQL, disk and S3 (minutes); counts as JSON"
	@echo "make services  start PostgreSQL and an S3 endpoint here, to try a shared store with; Ctrl-C stops them"
	@echo "make bench   ratios of time against their goals, as JSON, kept in benchmarks/results (half an hour)"
	@echo "make adapter train the adapter of smollm2 again: hours; needs KV_MEMORY_DATA or a network"

setup: $(READY)

venv:
	@set -eu; [ -z "$(is_whole)" ] || exit 0; \
	for python in $(PYTHONS); do \
	    if "$$python" -c "$(SUITED)" 2>/dev/null; then \
	        [ ! -e $(VENV) ] || echo "$(VENV) is incomplete, or of another Python: it is made again"; \
	        echo "[1/4] Creating $(VENV) with $$("$$python" --version)"; \
	        exec "$$python" -m venv --clear $(VENV); \
	    fi; \
	done; \
	echo "kv-memory needs Python 3.11, 3.12 or 3.13 with its venv module; tried: $(PYTHONS)" >&2; \
	echo "python3 here: $$(python3 --version 2>&1 | head -n 1)" >&2; \
	echo "Install one (Debian and Ubuntu: also python3-venv), or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	exit 1

$(READY): pyproject.toml requirements.lock Makefile | venv
	@rm -f $(READY) $(LOG)
	@echo "[2/4] Installing kv-memory and the packages of requirements.lock (a few minutes the first time)"
	@# Constraints, not a list: a CPU build of torch needs no CUDA packages, though the lock names their versions too.
	@# setuptools first, so that nothing is built with a release that the lock does not name.
	@$(PIP) install --no-compile -c requirements.lock setuptools && \
	    $(PIP) install --no-compile -c requirements.lock --no-build-isolation -e '.[dev,embedded]' || { $(EXPLAIN); }
	@# pip compiles on one core, this on all. Where byte code may not be written later, each process would compile again.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib kv_memory integrations || true
	@strays=$$($(BIN)/python -m tests.lock); [ -z "$$strays" ] || $(PIP) uninstall -y $$strays
	@$(call PREPARE,[3/4] )
	@echo "[4/4] Ready: $(BIN)/kv-memory --help"
	@printf '%s' '$(CURDIR)' > $(READY)

models:
	@$(call PREPARE)

# uv resolves for every Python and system at once. It is installed alone where setup has not been, or cannot be.
lock: venv
	@[ -x $(BIN)/uv ] || $(PIP) install -c requirements.lock uv || $(PIP) install uv
	@$(BIN)/uv pip compile pyproject.toml --quiet --universal --upgrade --extra dev --extra embedded \
	    --annotation-style line --custom-compile-command "make lock" --output-file requirements.lock > /dev/null
	@git diff --stat -- requirements.lock 2>/dev/null || true

demo: $(READY)
	@$(BIN)/kv-memory demo

# Processes, each with one thread: torch's threads of two processes on the same cores wait for each other.
TESTERS := 2

test: $(READY)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	    $(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder $(ARGS)

stress: $(READY)
	@$(BIN)/python -m tests.stress $(ARGS)

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/python -m tests.prose
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log >&2; exit 1; }
	@$(BIN)/mypy

oldest newest: $(READY)
	@$(BIN)/nox --session $@ -- $(ARGS)

bench: $(READY)
	@$(BIN)/python benchmarks/ttft.py --goals --lengths 4096
	@$(BIN)/python benchmarks/ttft.py --goals --lengths 4096 --model qwen-0.5b
	@$(BIN)/python benchmarks/store.py --goals --entries 1000
	@$(BIN)/python benchmarks/steady.py
	@$(BIN)/python benchmarks/batching.py
	@$(BIN)/python benchmarks/batching.py --model qwen-0.5b --new-tokens 32

# The shipped adapter is the outcome of three runs: at full strength, then with the strength that the keep ratio asks for
# (the best checkpoint), then on longer and other documents (the last one). Each goes on where it was stopped.
TRAIN   := $(BIN)/kv-memory train --model smollm2
GO_ON    = $(if $(wildcard $(1)/checkpoints),--resume)

adapter: $(READY)
	@$(TRAIN) runs/first --data squad --set full_strength_ratio=1 --set ratio_power=0 --set lr_lora=8e-4 \
	    --set warmup_steps=248 --steps 503 --set eval_every=150 --set eval_documents=10 --set checkpoint_every=50 $(call GO_ON,runs/first)
	@$(TRAIN) runs/second --init runs/first/adapter --data squad --set full_strength_ratio=0.0625 --set lr_lora=6e-4 \
	    --steps 1600 --set eval_every=400 --set eval_documents=10 --set checkpoint_every=50 $(call GO_ON,runs/second)
	@$(TRAIN) runs/shipped --init runs/second/adapter --data squad:0.3 --data fairytaleqa --data squality --data dolly \
	    --set max_tokens=1000 --set spans_per_document=2 --set warmup_weight=0.1 --set lr_lora=4e-4 --set seed=1 \
	    --set warmup_steps=0 --steps 747 --set checkpoint_every=50 $(call GO_ON,runs/shipped)

services: setup
	@$(BIN)/python tests/services.py
