# make demo   a whole federation on drawn pictures, from nothing to a report
# make test   lint, types and tests; `make help` lists the rest
#
# PYTHON    the interpreter that makes the environment (3.11 or 3.12)
# VENV      where it stands
# PIP_ARGS  more arguments for pip; on a machine without a GPU this saves gigabytes:
#           make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

# Run each one, not only look for it: a version manager's python3.11 may be there and refuse to start.
PYTHON ?= $(shell for p in python3.11 python3 python3.12; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

# Nothing phones home or fetches what nobody named.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-long e2e lint base
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@echo "make demo       install, then run a federation on drawn pictures to a finished report"
	@echo "make test       install, then lint, types and every test but the long ones"
	@echo "make test-long  the tests that take minutes"
	@echo "make e2e        a standing federation of real processes, and all that is tried against it"
	@echo "make lint       ruff and mypy alone"
	@echo "make base       train the demo's public base again"

demo: $(STAMP)-simulation
	$(BIN)/polyclinic-simulate run phantom-demo --home .polyclinic --resume
	@report=$$(ls -t "$$PWD"/.polyclinic/runs/phantom-demo-*/report.html | head -n 1); test -n "$$report" && echo "The report: $$report"

# One thread a worker: torch's threads only get in each other's way when workers share the cores.
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest -m "not long and not e2e" -n 2 --dist worksteal

test-long: $(STAMP)-dev
	$(BIN)/python -m pytest -m long

e2e: export OMP_NUM_THREADS := 1
e2e: $(STAMP)-dev
	$(BIN)/python -m pytest tests/e2e

lint: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p polyclinic
	$(BIN)/mypy tests

# Both parts see the public reference's pretrain part only. Write the printed hashes into the study.
# One thread, so that sums are taken in the same order on every machine of a kind.
base: export OMP_NUM_THREADS := 1
base: $(STAMP)-simulation
	$(BIN)/polyclinic-simulate reference phantom-demo --home .polyclinic --out .polyclinic/phantom-reference
	$(BIN)/polyclinic-server pretrain vae phantom-demo --reference .polyclinic/phantom-reference --out common/bases/phantom/vae
	$(BIN)/polyclinic-server pretrain generator phantom-demo --reference .polyclinic/phantom-reference --vae common/bases/phantom/vae --out common/bases/phantom/start.safetensors

# A stamp is written last, so that an interrupted install is done again.
$(STAMP)-venv:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: apt install python3, or make PYTHON=/path/to/it" >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" || { echo "venv is needed: apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(STAMP)-simulation: $(STAMP)-venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[simulation]"
	@touch $@

# [dev] contains [simulation], so one install serves both.
$(STAMP)-dev: $(STAMP)-venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $(STAMP)-simulation $@
