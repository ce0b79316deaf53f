# make demo    a first run, from nothing: environment, install, heatmaps, report
# make test    the whole test suite, from nothing
# make help    all targets
# make paper-igospp SCALE=smoke    a paper's tables and figures beside the published numbers

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

SCALE    ?= smoke
SETTINGS ?=
PAPERS   := paper-iba-covid-ct paper-chexplain paper-igospp paper-input-iba paper-salient-region

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types wheel lock clean $(PAPERS)

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 29

setup: $(READY)  ## .venv with the project (editable) and everything it is developed with, at the locked versions

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

demo: $(READY)  ## explain seven photographs with a trained network, on this machine, without downloads
	$(BIN)/ibxai run

test: $(READY)  ## the test suite
	$(BIN)/python -m pytest

paper-iba-covid-ct:    ## IBA-CT's tables and figures, computed; SCALE=full on MosMed, else on made slices
paper-chexplain:       ## CheXplain's; SCALE=full on ChestX-ray8 and BrixIA
paper-igospp:          ## iGOS++'s; SCALE=full on ImageNet, COVIDx and Fashion-MNIST
paper-input-iba:       ## InputIBA's; SCALE=full on ImageNet, CIFAR-10 and IMDB
paper-salient-region:  ## the salient regions'; SCALE=full on MNIST, CIFAR-10 and SVHN

$(PAPERS): $(READY)
	$(BIN)/python scripts/paper.py $(@:paper-%=%) --scale $(SCALE) $(SETTINGS)

lint: $(READY)  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## put the code in format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## mypy on the package
	$(BIN)/mypy

wheel: $(READY)  ## build the wheel, install it in a clean environment and ask it for `ibxai list`
	$(BIN)/python scripts/check_wheel.py

lock: pyproject.toml  ## renew requirements.lock from pyproject.toml, in a clean environment
	$(PYTHON) scripts/lock.py

clean:  ## remove the environment and what tools leave behind; outputs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
