# `make test` in a fresh clone does all the setup, in .venv. PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: venv test test-all demo lint format typecheck docs bench clean

venv: $(READY)

# An editable install copies the files of nnunet_trainers/discovery, so they are prerequisites too.
$(READY): pyproject.toml $(shell find nnunet_trainers/discovery -name '*.py' -o -name '*.pth')
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m "slow or not slow"

demo: $(READY)
	$(BIN)/ima-seg demo -o demo_output

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict

# Those that need no data set.
MEASUREMENTS := speed.ops speed.attack_speed speed.whole_volume cost.train_cost cost.step_overhead cost.monai_overhead
bench: $(READY)
	set -e; for script in $(MEASUREMENTS); do $(BIN)/python -m "benchmarks.$$script"; done

clean:
	rm -rf .venv build dist site demo_output .pytest_cache .mypy_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
