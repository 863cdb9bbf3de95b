# Every target sets up what it needs, once, in .venv.
#
#   make demo    the demonstration, into demo-report/ (anew each time)
#   make test    lint, types, documentation and tests: what CI runs
#   make test-tl4    of these, adapters and the lens beside TransformerLens 4
#   make test-lowest   the tests, on the lowest versions that pyproject.toml allows
#   make test-slow     the scripts of the paper's experiments, small, and slow tests: minutes
#   make real     the three uses on SmolLM2-135M and Gemma 3 270M: half an hour; TRUTH=DIR for probes
#   make faults  kills, flipped bits, full disks: the table of docs/results/faults.md
#   make docs    the documentation, into site/
#   make docs-tables   the tables of the documentation that tests write, written anew
#   make docs-families   the same, of model families, on both versions of TransformerLens
#   make dist    the wheel and the sdist, into dist/ (anew each time)
#   make bench   what centroids, SAEs on them and circuits cost, and circuits beside other methods
#
# PYTHON=python3.12 chooses another interpreter, CONSTRAINTS=/dev/null the newest versions instead of
# those that were tested. On Linux, PyPI's torch brings gigabytes of CUDA libraries;
# PIP_EXTRA_INDEX_URL set to PyTorch's CPU wheel index avoids them, and for test-lowest
# UV_TORCH_BACKEND=cpu.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)/lowest
# Beside everything else in $(VENV): first on the path, it stands before the TransformerLens there.
LENS4 := $(VENV)/transformer-lens-4
LENS4_VERSION := 4.3.0
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-tl4 test-lowest test-slow real faults docs docs-tables docs-families check \
	format dist bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	rm -rf demo-report
	$(BIN)/lch demo --out demo-report

test: $(VENV)/ready check docs
	$(BIN)/pytest -n auto --dist loadgroup
	$(MAKE) test-tl4

# What reads TransformerLens itself; the whole suite runs there as well.
test-tl4: $(LENS4)/ready
	PYTHONPATH="$(CURDIR)/$(LENS4)" $(BIN)/pytest -n auto --dist loadgroup \
		tests/adapters/transformer_lens tests/lens tests/test_families.py tests/test_imports.py

test-lowest: $(LOWEST)/ready
	$(LOWEST)/bin/python -m pytest -n auto --dist loadgroup

test-slow: $(VENV)/ready $(LENS4)/ready
	$(BIN)/pytest -m "slow or not slow" tests_slow
	$(BIN)/pytest -m slow
	PYTHONPATH="$(CURDIR)/$(LENS4)" $(BIN)/pytest -m "slow or not slow" \
		tests/circuits/scores tests/test_documentation.py tests/test_families.py

real: $(VENV)/ready
	$(BIN)/python -W ignore examples/real_models/weights.py real/weights
	$(BIN)/python -W ignore examples/real_models/run.py real/weights --out real/results \
		$(if $(TRUTH),--truth "$(TRUTH)")

faults: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.faults.harness

# Warnings are errors: a link that leads nowhere, a page that is not in the navigation.
docs: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

docs-tables: $(VENV)/ready
	$(BIN)/python -W ignore -m tests.docs

docs-families: $(LENS4)/ready
	$(BIN)/python -W ignore -m tests.test_families
	PYTHONPATH="$(CURDIR)/$(LENS4)" $(BIN)/python -W ignore -m tests.test_families

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# In an environment of its own, as an installer builds it.
dist: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

bench: $(VENV)/ready
	$(BIN)/python -W ignore benchmarks/centroids.py
	$(BIN)/python -W ignore benchmarks/scaling.py
	$(BIN)/python -W ignore benchmarks/saes.py
	$(BIN)/python -W ignore benchmarks/attribution.py
	$(BIN)/python -W ignore benchmarks/graphs.py
	$(BIN)/python -W ignore benchmarks/circuits.py

# torch first and alone: with it installed, nothing else asks for a newer one.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

$(LENS4)/ready: $(VENV)/ready Makefile
	rm -rf $(LENS4)
	$(BIN)/pip install --quiet --no-deps --target $(LENS4) transformer-lens==$(LENS4_VERSION)
	touch $@

# Of what the package asks for itself the lowest versions, of the rest those that go with them.
$(LOWEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python \
		--resolution lowest-direct --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) dist demo-report site .pytest_cache .mypy_cache .ruff_cache .hypothesis
