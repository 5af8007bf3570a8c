# Two commands do everything: `make demo` and `make test`. Each sets up .venv by itself.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# As many test processes as cores; each test pins its own forward passes to one thread.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test test-slow check docs bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dashboard,demo,docs,view,test]'
	touch $@

demo: $(VENV)/.installed  ## Segment real cells and say where to look
	$(BIN)/megaseg demo megaseg-demo

test: $(VENV)/.installed  ## Every promise, fast
	$(BIN)/python -m pytest -m 'not slow' -n $(WORKERS) --dist loadfile --durations=10

test-slow: $(VENV)/.installed  ## What takes longer: kills, large volumes, servers
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile --durations=10

check: $(VENV)/.installed  ## Lint, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed  ## Build the pages into site/, strictly and offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed  ## Measure, and write benchmarks/results
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache megaseg-demo site
