# Two commands do everything: `make demo` and `make test`. Each sets up .venv by itself.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# As many test processes as cores; each test pins its own forward passes to one thread.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test test-slow matrix check lock docs bench clean

PIP = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

$(BIN)/python:
	@echo "Making a Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# What the demo and the viewer need.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing megaseg and what it needs into $(VENV). PyTorch is large: this can take some minutes."
	@$(PIP) -e '.[demo,view]'
	@touch $@

# What tests and pages need, and with it all that the demo needs.
$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing megaseg and what its tests need into $(VENV): about 3 GB, some minutes."
	@$(PIP) -e '.[dashboard,demo,docs,import,view,test]'
	@touch $(VENV)/.demo $@

# What the tests of the plugin for napari need besides.
$(VENV)/.napari: $(VENV)/.test
	@echo "Installing napari into $(VENV): 0.4 GB."
	@$(PIP) -e '.[napari]' PyQt6
	@touch $@

demo: $(VENV)/.demo  ## Segment real nuclei, and print where the results are
	@$(BIN)/megaseg demo megaseg-demo

test: $(VENV)/.test  ## Every promise, fast
	$(BIN)/python -m pytest -m 'not slow' -n $(WORKERS) --dist loadfile --durations=10

test-slow: $(VENV)/.napari  ## What takes longer: kills, large volumes, servers
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile --durations=10

matrix:  ## The fast tests, or TESTS, on each Python from 3.11 to 3.14 that is installed, or on PYTHONS
	$(PYTHON) -m tests.matrix $(TESTS) $(if $(PYTHONS),--pythons $(PYTHONS))

check: $(VENV)/.test  ## Lint, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The newest release of Python 3.11 that a dependency leaves out is 3.11.0.
lock: | $(BIN)/python  ## Write requirements.lock anew, from pyproject.toml and constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml -c constraints.txt -o requirements.lock --quiet \
		--extra demo --extra view --extra dashboard --extra openvino --extra import \
		--universal --python-version 3.11.1 --generate-hashes --no-annotate \
		--custom-compile-command "make lock"

docs: $(VENV)/.test  ## Build the pages into site/, strictly and offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.test  ## Measure, and write benchmarks/results
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .matrix .pytest_cache .mypy_cache .ruff_cache megaseg-demo site
