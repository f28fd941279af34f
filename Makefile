PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check bench bench-trainers exactness docs clean

# One stamp for each set of extras: pip runs once, and again when the project's requirements change.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.live: pyproject.toml constraints.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[live]'
	$(BIN)/python -m pip check
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

# Keras on JAX and on TensorFlow, without torch and without the project.
.venv-%/.done: benchmarks/speed/%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# The main job: train a U-Net twice on real digits, with the ledger on; ends with runs/demo/report.html.
demo: $(VENV)/.demo
	$(BIN)/lossledger demo

# Everything that guards main, in minutes: shared by the cores, each test in one process.
QUICK := $(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist worksteal

test: $(VENV)/.dev
	$(QUICK)

# The demo at full size with its effect, every loss and step on a pretended device, and thousands of random cases
# against the installed Keras, tf_keras, torch and optax.
test-slow: $(VENV)/.live
	$(BIN)/python -m pytest -m slow

# Format, lint, types, then the tests.
check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(QUICK)

# Speed, measured beside plain torch in one run, then exactness; prints tables and writes benchmarks/results.
bench: $(VENV)/.dev exactness
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/window.py
	$(BIN)/python benchmarks/levers.py
	$(BIN)/python benchmarks/samples.py
	$(BIN)/python benchmarks/rows.py
	$(BIN)/python benchmarks/calls.py
	$(BIN)/python benchmarks/sizes.py
	$(BIN)/python benchmarks/ledger.py
	$(BIN)/python benchmarks/vocabulary.py

# A training step, evaluate and predict beside raw torch and other trainers: about an hour, on a machine that does
# nothing else. Parts of it: the scripts with --workloads, --contenders, --precisions, --repeats, --steps.
bench-trainers: $(VENV)/.bench .venv-jax/.done .venv-tensorflow/.done
	$(BIN)/python benchmarks/trainers.py
	$(BIN)/python benchmarks/inference.py

# Errors of losses and gradients, beside other trainers.
exactness: $(VENV)/.bench
	$(BIN)/python benchmarks/exactness.py

# The pages are Markdown; their code blocks are executed by the tests.
docs: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_documents.py

clean:
	rm -rf $(VENV) .venv-jax .venv-tensorflow build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
