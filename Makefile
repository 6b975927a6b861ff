# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

# files side by side, each from its first test to its last: much of the suite waits, and files share what they make
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      a small Llama from Hugging Face through all four stages and back, on this machine"
	@echo "make test      the test suite, without what is marked long"
	@echo "make test-all  the whole test suite"
	@echo "make lint      ruff, mypy and the floors of the house"
	@echo "make clean     remove outputs and the environment"

# torch first: pip then keeps the build it found (CPU wheels where those are what the index offers)
.venv/.ready: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/python tools/demo.py

test: .venv/.ready
	$(PYTEST) -n 3 -m "not long"

# two here: what starts a Slurm or a torchrun keeps both cores busy by itself
test-all: .venv/.ready
	$(PYTEST) -n 2

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf .venv outputs runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
