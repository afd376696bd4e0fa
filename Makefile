# Two commands on a fresh machine with only python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
RESOLUTION ?= lowest-direct
SECONDS ?= 60

.PHONY: demo test test-fast test-resolved test-browser fuzz audit check docs format figures notebook tables catalogue
.PHONY: dist smoke clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnlens needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

demo: $(VENV)/installed  ## Look at the ViT shipped with the package: table on the terminal, figures and report in figures/
	$(BIN)/attnlens inspect
	$(BIN)/attnlens report --output figures/embedded/report.html

test: $(VENV)/installed  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(VENV)/installed  ## Run what is worth running at each save: under a minute on two idle cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" -q

test-resolved:  ## Run the tests on the lowest versions that pyproject.toml allows (RESOLUTION=highest: the newest)
	$(PYTHON) -m venv .venv-$(RESOLUTION)
	.venv-$(RESOLUTION)/bin/python -m pip install --quiet uv
	.venv-$(RESOLUTION)/bin/uv pip install --quiet --python .venv-$(RESOLUTION) --resolution $(RESOLUTION) --editable . --group dev
	OMP_NUM_THREADS=1 .venv-$(RESOLUTION)/bin/python -m pytest -n $(WORKERS) --dist loadfile

audit:  ## Look up known flaws of the lowest and of the newest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet uv pip-audit
	for resolution in lowest-direct highest; do \
	  .venv-audit/bin/uv pip compile pyproject.toml --quiet --resolution $$resolution --output-file .venv-audit/$$resolution.txt && \
	  .venv-audit/bin/pip-audit --requirement .venv-audit/$$resolution.txt --no-deps --disable-pip --strict || exit 1; \
	done

fuzz: $(VENV)/installed  ## Give the package's own parsers what libFuzzer makes, SECONDS=60 each
	$(BIN)/python -m pip install --quiet --group fuzz
	$(BIN)/python -m benchmarks.trust.coverage_guided --seconds $(SECONDS) --no-record

test-browser: $(VENV)/installed  ## Try the report in Chromium, which is installed from Debian's packages where it is missing
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null; then \
	  command -v apt-get >/dev/null || { echo "no apt-get here: install chromium and chromedriver by hand"; exit 1; }; \
	  sudo=$$(command -v sudo || true); \
	  $$sudo apt-get update && $$sudo apt-get install --yes --no-install-recommends chromium chromium-driver; \
	fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_report_browser.py

check: $(VENV)/installed docs  ## Lint, format and type checks; the site, a warning being an error
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(VENV)/installed  ## Make the figures of the docs again
	$(BIN)/python docs/example.py docs/gallery > docs/gallery/example.txt
	$(BIN)/python docs/filters.py > docs/gallery/filters/filters.txt
	$(BIN)/python docs/rewire.py > docs/gallery/signal/rewire.txt
	$(BIN)/python docs/paper_figure.py

notebook: $(VENV)/installed  ## Run the notebook of the docs again
	$(BIN)/python scripts/build_notebook.py

tables: $(VENV)/installed  ## Write the tables of the docs that follow from the registries
	$(BIN)/python scripts/registry_tables.py

catalogue: $(VENV)/installed  ## Build the catalogue of the installed timm that the package ships: some five minutes
	$(BIN)/python scripts/ship_catalogue.py

dist: $(VENV)/installed  ## Build the sdist, and the wheel from it, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

smoke: dist  ## Install both into an empty environment, with every dependency, and try the commands there: minutes, 6 GB
	$(BIN)/python scripts/smoke_test.py dist

clean:
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache dist site
