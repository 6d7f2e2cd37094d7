# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# About three minutes of training on two CPU cores, with no network once installed.
demo: install
	$(BIN)/gpt train nano --minutes 3 --out runs/demo --overwrite
	@echo
	@echo "Three stories by the model that was just trained:"
	@$(BIN)/gpt generate runs/demo -n 3 --seed 1
	@echo
	@echo "loss plot: runs/demo/loss.png"

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

clean:
	rm -rf .venv build dist *.egg-info
