# Two commands are enough for a newcomer: `make demo` and `make test`. Both build .venv first if it is missing.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$$p"; break; }; done)
PIP_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv demo test test-fast lint format bench bench-check bench-pipeline bench-store bench-table clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       extract, train, evaluate and predict on generated images, in minutes, without a GPU"
	@echo "make test       all tests (TEST_ARGS='-k episodes' for some; TEST_WORKERS=1 one after the other)"
	@echo "make test-fast  those that need no Ray, server, browser or patience: about a minute"
	@echo "make lint       ruff and mypy"
	@echo "make format     rewrite the code as 'make lint' wants it"
	@echo "make bench      time training and evaluation against the published way (BENCH_ARGS='--backbones vgg16' for a part)"
	@echo "make bench-pipeline  time extraction, evaluation and training as commands, and their waiting for data"
	@echo "make bench-store  rates of reading a feature store, against a mapped file and zarr"
	@echo "make bench-check  a short run; says what became slower, relative to the published way, than the stored results"
	@echo "make bench-table  README's table of speed, from benchmarks/results/"
	@echo "make venv       .venv with the pinned versions and the command .venv/bin/hsnet"
	@echo "make clean      remove caches, builds and the demo's output; 'make distclean' removes .venv too"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter (3.11 or newer) for .venv. The package registry's torch may bring"
	@echo "gigabytes for GPUs; on a machine without one, this is smaller:"
	@echo "  make venv PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"

venv: $(STAMP)

# torch first: it is most of the download, and its failure should be seen before anything else is installed.
# Without build isolation, so that the build, too, uses the pinned setuptools.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found (zarr 3 needs it). Install one, or name it:" \
		"make venv PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is missing or older than Python" \
		"3.11, which zarr 3 needs. Name a newer one: make venv PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/pip || { rm -rf .venv && "$(PYTHON)" -m venv .venv; } || { rm -rf .venv; \
		echo "Could not create .venv with $(PYTHON). On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt torch==2.13.0 torchvision==0.28.0 setuptools
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev,timm,serve,heic]'
	@touch $@

demo: $(STAMP)
	$(BIN)/hsnet demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not (ray or s3 or browser or slow)" $(TEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

bench-pipeline: $(STAMP)
	$(BIN)/python -m benchmarks.pipeline $(BENCH_ARGS)

bench-store: $(STAMP)
	$(BIN)/python -m benchmarks.store $(BENCH_ARGS)

bench-check: $(STAMP)
	$(BIN)/python -m benchmarks.check $(BENCH_ARGS)

bench-table: $(STAMP)
	$(BIN)/python -m benchmarks.table --write

clean:
	rm -rf build dist demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
