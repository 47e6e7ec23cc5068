# make demo: set up and measure the bundled pipeline.  make test: set up and run every check.
PYTHON ?= python3
VENV ?= .venv
THREADS ?= 2
MODEL ?= fashion-dit
OUT ?= runs/quick
PYTEST_ARGS ?=

# pip waits for downloads and pyright has one thread: what does not depend on each other runs side by side.
MAKEFLAGS += --jobs=2

BIN := $(VENV)/bin
DATASET := /usr/share/datasets/fashion-mnist
PINNED := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) OPENBLAS_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: help demo test suite nightly check format bench notebooks dataset browser clean distclean

help:
	@echo "make demo       create $(VENV), sweep a bundled pipeline within 3 minutes, write $(OUT)/report.html"
	@echo "make test       create $(VENV), run ruff, pyright and pytest"
	@echo "make nightly    5,000 random sequences of events, and every combination of methods"
	@echo "make check      ruff and pyright only"
	@echo "make format     let ruff rewrite what it can"
	@echo "make bench      the full sweep, into runs/full"
	@echo "make notebooks  run the notebooks and keep their output"
	@echo "make clean      remove build leftovers and tool caches (distclean: $(VENV) too)"
	@echo "settings        VENV=.venv PYTHON=python3 THREADS=2 OUT=runs/quick PYTEST_ARGS='-k word'"

demo: $(VENV)/.installed
	$(PINNED) $(BIN)/dita sweep --model $(MODEL) --quick --threads $(THREADS) --out $(OUT)

bench: $(VENV)/.installed-eval dataset
	$(PINNED) $(BIN)/dita sweep --model $(MODEL) --threads $(THREADS) --out runs/full

test: check suite

# One process a core, each on one thread: most tests are too small for two threads to help.
suite: $(VENV)/.installed-dev dataset browser
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(OFFLINE) \
	  $(BIN)/python -m pytest -n $(THREADS) --dist worksteal $(PYTEST_ARGS)

# What random sequences of events and all combinations of methods do not bring to light in a minute.
nightly: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(OFFLINE) \
	  $(BIN)/python -m pytest -n $(THREADS) --timeout 0 --hypothesis-profile nightly $(PYTEST_ARGS) \
	  tests/test_fuzz.py tests/test_pairs.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.installed-dev
	$(PINNED) $(OFFLINE) $(BIN)/jupyter execute --inplace notebooks/*.ipynb

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-eval: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[eval,peers]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --no-compile --editable '.[dev,eval,notebooks,peers]'
	@touch $@

# Only training and a few tests read the images; elsewhere than on Debian dita.eval.data downloads them on first use.
dataset:
	@if [ -d $(DATASET) ] || [ -n "$$DITA_FASHION_MNIST" ]; then \
	  exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Debian's dataset-fashion-mnist"; \
	  apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends dataset-fashion-mnist \
	    || echo "apt-get could not install dataset-fashion-mnist: it will be downloaded, tests that need it skip"; \
	else \
	  echo "no $(DATASET): the data set will be downloaded on first use (see dita.eval.data)"; \
	fi

# A few tests look at report.html in a browser; without one they skip. After the data set: apt-get runs once at a time.
browser: dataset
	@if command -v chromium chromium-browser google-chrome >/dev/null; then \
	  exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Debian's chromium"; \
	  apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null \
	    || echo "apt-get could not install chromium: the tests of the report in a browser skip"; \
	fi

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
