# Two commands do everything: `make demo` and `make test`. The first call of any target makes .venv; later calls reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow lint format docs bench sbom clean

demo: $(READY)
	$(BIN)/clipstack demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not alone"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and alone"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks

# What the API's image holds besides Debian's packages: a bill of materials (CycloneDX) and the licences, in build/.
# TORCH_INDEX_URL: where torch comes from, as for the image; empty: pip's own index.
SERVE := build/serve-environment
TORCH_INDEX_URL ?=
SERVE_PIP := $(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

sbom: $(READY) $(SERVE)/.ready
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file build/serve.cdx.json \
		$(SERVE)/bin/python
	$(BIN)/pip-licenses --python $(SERVE)/bin/python --format markdown --with-urls --with-system --output-file build/serve-licences.md

$(SERVE)/.ready: pyproject.toml constraints.txt docker/requirements.py
	@$(PYTHON) -m venv --clear $(SERVE)
	@$(SERVE_PIP) --no-deps $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch torchvision
	@$(PYTHON) docker/requirements.py serve openvino > $(SERVE)/requirements.txt
	@$(SERVE_PIP) --requirement $(SERVE)/requirements.txt
	@$(SERVE)/bin/python -m pip uninstall --quiet --yes pip
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build site

# DeepSpeed comes as source and looks at torch while it is packed, so torch and the build tools go first. Nothing is
# compiled: DS_BUILD_OPS=0. clip-benchmark is what tests compare metrics with; its dependencies read data sets, which none does.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("clipstack needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@echo "Setting up $(VENV) (once, some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools wheel packaging hatchling editables numpy torch torchvision
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation --editable '.[dev]'
	@$(PIP) --no-deps clip-benchmark
	@touch $(READY)
