# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test install hashes faults chromium clean

install: .venv/installed

# What is installed is what was tested, by its hashes; torch and what it brings apart, since its build differs from machine
# to machine. Compiled by all cores at once, which pip does not; some packages hold files of other Pythons, which fail.
.venv/installed: pyproject.toml constraints.txt constraints-hashes.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes --requirement constraints-hashes.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true
	touch $@

# After a change of constraints.txt, with uv on the path: the hashes of every file of each release, for all platforms.
hashes:
	grep -vE '^(#|torch==|triton==)' constraints.txt | uv pip compile --quiet --no-deps --generate-hashes --no-annotate \
	  --custom-compile-command 'make hashes' --python-version 3.11 --output-file constraints-hashes.txt -

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

# What was tried to break it: some ten thousand cases, in less than half an hour; a full disk needs root.
faults: install
	$(BIN)/python -m tests.faults

clean:
	rm -rf .venv build dist *.egg-info
