# make demo: train, prune and cut on bundled data.   make test: run the tests.
# Both set up their own environment in .venv; nothing else is touched.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
MORE := tests/methods tests/valley tests/experiments

.PHONY: demo test test-more study check benchmark clean

demo: $(VENV)/experiments
	$(RUN) -m experiments.demo

test: $(VENV)/test
	$(RUN) -m pytest -n 2 --dist loadfile $(addprefix --ignore ,$(MORE))

# What stands around training and cutting.
test-more: $(VENV)/test
	$(RUN) -m pytest -n 2 --dist loadfile $(MORE)

# The long ones, for which nobody should wait.
study: $(VENV)/test
	$(RUN) -m pytest -n 2 --dist loadfile -m study

# What continuous integration adds to the tests.
check: $(VENV)/test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)
	$(RUN) -m pytest --doctest-modules sdp_jax

benchmark: $(VENV)/experiments
	$(RUN) -m experiments.benchmarks.update_cost

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "sdp_jax needs Python 3.11 or newer; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/experiments: pyproject.toml $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[experiments]'
	touch $@

$(VENV)/test: pyproject.toml $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo dist
