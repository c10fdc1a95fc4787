# The two commands of the README are `make demo` and `make test`; the rest is for whoever works on the code.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
BENCH_JSON ?= build/bench.json
GPU_JSON ?= build/gpu.json
WORKERS ?= 2
FUZZ ?= 5000
MARK ?= not exhaustive
CONFORMANCE_VENV ?= .venv-conformance
CONFORMANCE_OUT ?= build/conformance
DOCS_VENV ?= .venv-docs
BIN = $(VENV)/bin
DRIVER = $(MAKE) --silent --no-print-directory -j$(shell getconf _NPROCESSORS_ONLN) -f tests/csrc/Makefile
INSTALL = pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo demo-llm test fuzz bench bench-smoke report gpu conformance docs lint asan aarch64 format dist hub-kernel clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make demo    fresh environment, install, MiniLM learns chapter after chapter of the ICD-10-CM (minutes, CPU)
demo: EXTRAS = demo
demo: PRESET = demo

## make demo-llm  fresh environment, Gemma 3 270M learns three of the chapters and is asked the same question before,
##              between and after them (a quarter of an hour, CPU; the model is under the Gemma Terms of Use)
demo-llm: EXTRAS = demo,gemma
demo-llm: PRESET = demo_llm

demo demo-llm:
	rm -rf $(DEMO_VENV) build/lib* build/bdist* build/temp*  # setuptools would install modules that are gone
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/$(INSTALL) torch
	SLAO_KERNELS_BUILD=$${SLAO_KERNELS_BUILD-cpu} $(DEMO_VENV)/bin/$(INSTALL) ".[$(EXTRAS)]"
	$(DEMO_VENV)/bin/slao run --preset $(PRESET) --overwrite

## make test    environment (if there is none), install, tests; MARK= for the exhaustive grids too, WORKERS= processes
test: $(VENV)/.installed
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "$(MARK)" $(ARGS)

## make fuzz    readers of outside data, ops and sequences of calls on FUZZ= random cases a test, new ones every time
##              (minutes)
fuzz: $(VENV)/.installed
	SLAO_FUZZ=$(FUZZ) $(BIN)/pytest -n $(WORKERS) -k fuzz tests --timeout 0 $(ARGS)

## make bench   all benches on this machine's device (without a GPU about eight minutes): figures into
##              build/bench.json (elsewhere with BENCH_JSON=), tables and plots beside it
bench: $(VENV)/.installed
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/pytest bench -v --benchmark-json=$(BENCH_JSON) $(ARGS)
	$(BIN)/python bench/report.py $(BENCH_JSON)

## make bench-smoke  benches of what is done between tasks, one round each on MiniLM's layers: do they run? (a minute)
bench-smoke: $(VENV)/.installed
	$(BIN)/pytest bench --model minilm --rounds 1 --threads 1 -q -k "scaled_merge or orthogonal_init or transition or bench_fold"

## make report  tables and plots of build/bench.json; ARGS=build/gpu.json: of that; ARGS=--keep: into bench/results/
##              and the README, without host, user and paths (bench/results/README.md)
report: $(VENV)/.installed
	$(BIN)/python bench/report.py $(ARGS)

## make gpu     on a machine with a GPU: its tests and all benches, figures into build/gpu.json (GPU_JSON=);
##              PARTS="tests kernels layers steps rest host tune" chooses some of them and takes options of
##              bench/gpu.py (--quick, --deadline 900), ARGS= goes to pytest; bench/first_gpu.sh: in minutes, on loan
gpu:
	@$(PYTHON) bench/gpu.py $(PARTS) --look
	@$(MAKE) --no-print-directory $(VENV)/.installed
	@$(BIN)/python bench/gpu.py $(PARTS) --out $(GPU_JSON) -- $(ARGS)

## make conformance PEFT_TESTS=path  PEFT's own tests, of a checkout of its repository (at the release to test), with
##              and without patch, in an environment of their own; ARGS= goes to tests/conformance/run.py (minutes)
conformance:
	@test -d "$(PEFT_TESTS)/tests" || \
	  { echo "make conformance: PEFT_TESTS=path names no checkout of PEFT's repository (its tests are in no wheel)"; exit 2; }
	test -x $(CONFORMANCE_VENV)/bin/python || $(PYTHON) -m venv $(CONFORMANCE_VENV)
	$(CONFORMANCE_VENV)/bin/$(INSTALL) torch
	$(CONFORMANCE_VENV)/bin/$(INSTALL) -e ".[conformance]" \
	  "peft$$(sed -n 's/^__version__ = "\(.*\)"/==\1/p' "$(PEFT_TESTS)/src/peft/__init__.py")"
	$(CONFORMANCE_VENV)/bin/python tests/conformance/run.py "$(PEFT_TESTS)" --out $(CONFORMANCE_OUT) $(ARGS)

## make docs    the documentation site into build/site, in an environment of its own (no torch; a warning is an error)
docs:
	test -x $(DOCS_VENV)/bin/mkdocs || { $(PYTHON) -m venv $(DOCS_VENV) && \
	  $(DOCS_VENV)/bin/$(INSTALL) $$(sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",'); }
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	@echo "documentation: build/site/index.html"

## make lint    ruff and mypy
lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## make asan    the C++ kernels without Python under the address and undefined-behaviour sanitizers (a minute)
asan:
	@command -v $(CXX) >/dev/null || { echo "make asan: no C++ compiler ($(CXX)); name one with CXX="; exit 2; }
	@$(DRIVER) MODE=asan

## make aarch64 the same for aarch64, cross-compiled, without sanitizers; run where qemu-user is installed
aarch64:
	@command -v aarch64-linux-gnu-g++ >/dev/null || \
	  { echo "make aarch64: no aarch64-linux-gnu-g++ (Debian and Ubuntu: g++-aarch64-linux-gnu)"; exit 2; }
	@$(DRIVER) MODE=aarch64

## make format  rewrite the code in the project's format
format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## make dist    sdist and wheel (of this machine's Python and compiler) into dist/, checked by twine
dist: $(VENV)/.installed
	$(BIN)/$(INSTALL) build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

## make hub-kernel  lora_linear as a repository of the package `kernels`, in build/hub (tools/hub)
hub-kernel:
	rm -rf build/hub
	$(PYTHON) tools/hub/build.py build/hub

## make clean   remove environments and build products (runs/ stays)
clean:
	rm -rf $(VENV) $(DEMO_VENV) $(CONFORMANCE_VENV) $(DOCS_VENV) build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) torch
	$(BIN)/$(INSTALL) -e ".[dev]"
	touch $@
