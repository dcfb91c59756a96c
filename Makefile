# `make demo` and `make test` do the whole set-up themselves, once: .venv in this folder, pinned dependencies.
# Another interpreter: make demo PYTHON=/path/to/python3.12      More flags: make demo ARGS="--max_steps 100 --outdir demo_short"

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first Python of at least 3.11; looked for only when there is something to set up.
# With what makes a virtual environment; 3.14.1 is one that networkx does not run on.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11) or sys.version_info[:3] == (3, 14, 1))
FOUND = $(shell for python in $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3); do \
	"$$python" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$python" && break; done)

.PHONY: demo test test-faults install clean

demo: $(STAMP)
	@$(BIN)/fewstep demo $(ARGS)

# One thread in each of two processes: two cores, and the same arithmetic on every machine.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers 2
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

# What a run survives: kills, full disks, damaged files, any bytes. Mounting small disks takes root, or sudo.
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "faults or not faults" --hypothesis-profile faults tests/faults $(ARGS)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(if $(FOUND),,$(error no Python 3.11 or newer with venv found; install one (Debian and Ubuntu: python3 and python3-venv), or name it: PYTHON=/path/to/python3))
	@echo "setting up $(VENV) with $(FOUND); this takes a few minutes, once"
	@$(FOUND) -m venv $(VENV) || { echo "error: $(FOUND) cannot make $(VENV); on Debian and Ubuntu: apt install $(notdir $(FOUND))-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch hatchling editables
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
