# Every target builds its own .venv from python3 and pip alone and may be run again at no cost.
# The environment is made without its own pip (Debian's python3 has no ensurepip): the one at hand installs into it.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: demo test test-slow test-matrix planted lint bench bench-full notebooks clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python .venv/bin/python install -q -c constraints.txt -e ".[flows,arviz,examples,dev]"
	touch $@

demo: .venv/ready
	$(BIN)/python models/vae.py --output demo

test: .venv/ready
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

test-matrix:
	$(PYTHON) tests/matrix.py

planted: .venv/ready
	$(BIN)/python tests/planted.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python benchmarks/report.py --quick

bench-full: .venv/ready
	$(BIN)/python benchmarks/report.py --full

notebooks: .venv/ready
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf .venv .matrix .hypothesis build demo *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
