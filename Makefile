# `make demo` and `make test` work from a fresh clone; both make .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# More words for the installation of PyTorch, for example the index that has its CPU builds: `make demo TORCH_ARGS="..."`.
TORCH_ARGS ?=

# Tests run in so many processes side by side, each with one thread.
TEST_PROCESSES ?= 2

.PHONY: demo test lint types pytest docs install wheel browser clean distclean

demo: $(VENV)/.installed
	$(BIN)/edgedetr demo

# Steps that do not wait for each other run side by side: packages and browser, then style and types.
test:
	$(MAKE) --no-print-directory -j 2 $(VENV)/.installed-dev browser
	$(MAKE) --no-print-directory -j 2 --output-sync=target lint types
	$(MAKE) --no-print-directory pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/style.py

types: $(VENV)/.installed-dev
	$(BIN)/mypy

pytest: $(VENV)/.installed-dev browser
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --durations=15

# What is written from the source: docs/recipe-keys.md, edgedetr/recipe_list.json and edgedetr/model_list.json.
docs: $(VENV)/.installed
	$(BIN)/python -m edgedetr.recipe_reference
	$(BIN)/python -m edgedetr.recipe_list
	$(BIN)/python -m edgedetr.model_list

install: $(VENV)/.installed

# The file to copy to a device: dist/edgedetr-VERSION-py3-none-any.whl.
wheel: $(VENV)/.torch
	$(PIP) hatchling
	$(BIN)/python -m hatchling build -t wheel -d dist

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch into $(VENV) (the largest download)"
	$(PIP) $(TORCH_ARGS) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "installing this checkout with [all] into $(VENV)"
	$(PIP) -e ".[all]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing [dev] and NVIDIA's parser for the CPU into $(VENV)"
	$(PIP) -e ".[all,dev,qat,trt-check]"
	@touch $@

# The report is also tested in a real browser. Without one (and without root on Debian to get one) that test skips.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || command -v chromium-browser >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && echo "installing chromium for the browser test" \
	     && (timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 240 \
	         apt-get -qq install -y --no-install-recommends chromium) >/dev/null 2>&1; } \
	|| echo "no chromium here: the browser test will skip"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

distclean: clean
	rm -rf $(VENV)
