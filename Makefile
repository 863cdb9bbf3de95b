# Every target sets up what it needs, once, in .venv.
#
#   make demo    the demonstration, into demo-report/ (anew each time)
#   make test    lint, types and tests: what CI runs
#   make bench   what centroids, SAEs on them and circuits cost, and circuits beside other methods
#
# PYTHON=python3.12 chooses another interpreter. On Linux, PyPI's torch brings gigabytes of CUDA
# libraries; PIP_EXTRA_INDEX_URL set to PyTorch's CPU wheel index avoids them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test check format bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	rm -rf demo-report
	$(BIN)/lch demo --out demo-report

test: $(VENV)/ready check
	$(BIN)/pytest -n auto --dist loadgroup

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready
	$(BIN)/python -W ignore benchmarks/centroids.py
	$(BIN)/python -W ignore benchmarks/saes.py
	$(BIN)/python -W ignore benchmarks/attribution.py
	$(BIN)/python -W ignore benchmarks/graphs.py
	$(BIN)/python -W ignore benchmarks/circuits.py

# torch first and alone: with it installed, nothing else asks for a newer one.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-report .pytest_cache .mypy_cache .ruff_cache .hypothesis
