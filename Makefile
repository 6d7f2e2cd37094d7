# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test install chromium clean

install: .venv/installed

# Compiled by all cores at once, which pip does not; some packages hold files of other Pythons, which fail.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true
	touch $@

# From nothing to three aligned chat models on two CPU cores, with no network once installed.
demo: install
	$(BIN)/gpt demo --short --overwrite

# The page is tested in a real browser; where there is none and none can be had, those tests say that they are skipped.
chromium:
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null \
	  && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "installing Chromium, in which the page is tested"; \
	  { timeout 60 apt-get update -qq; \
	    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qq --no-install-recommends chromium; \
	  } > /dev/null 2>&1 || echo "Chromium could not be installed: the tests of the page will be skipped"; \
	fi

test: install chromium
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

clean:
	rm -rf .venv build dist *.egg-info
