# Two commands on a fresh machine with only python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test check format figures tables catalogue clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnlens needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

demo: $(VENV)/installed  ## Inspect the ViT shipped with the package: table on the terminal, figures in figures/
	$(BIN)/attnlens inspect

test: $(VENV)/installed  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(VENV)/installed  ## Lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(VENV)/installed  ## Make the README's figures again
	$(BIN)/attnlens inspect
	cp figures/embedded/depth_profile.png figures/readme/

tables: $(VENV)/installed  ## Write the tables of README and docs that follow from the registries
	$(BIN)/python scripts/registry_tables.py

catalogue: $(VENV)/installed  ## Build the catalogue of the installed timm that the package ships: some five minutes
	$(BIN)/python scripts/ship_catalogue.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist
