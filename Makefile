# Everything from a fresh clone: `make train` and `make test` set up .venv first. `make` alone explains.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
N ?= 2
LIVES ?= 300
SEED ?= 0
TORCH := torch==2.13.0
STAMP := $(VENV)/.complete
export OMP_NUM_THREADS ?= 1

.PHONY: help setup data train train-long test test-dali test-slow chaos slurm-drills slurm-drills-fast lint smoke clean

help:
	@echo "make train       set up, make the demo data, train the debug-size Keye-VL-1.5 on N=$(N) processes, evaluate (10 minutes)"
	@echo "make train-long  the same model trained longer (45 minutes)"
	@echo "make test        set up, then the CPU tests (15 minutes)"
	@echo "make test-dali   installs NVIDIA DALI (400 MB) and tests it as a decoder, on a GPU where there is one"
	@echo "make test-slow   the tests that kill whole runs (minutes)"
	@echo "make chaos       runs that are killed, stopped and starved of disk LIVES=$(LIVES) times, against undisturbed ones (15 minutes)"
	@echo "make slurm-drills  what launch/ promises, on a SLURM cluster inside this machine (30 minutes; root, Debian's slurm packages)"
	@echo "make smoke       layouts, training, resume and scoring on two GPUs or two CPU processes (10 minutes)"
	@echo "make lint        ruff over the code, shellcheck over the launchers where it is installed"
	@echo "make setup       only the virtual environment $(VENV), with the versions in constraints.txt"
	@echo "make data        only the demo data in data/demo"
	@echo "make clean       remove $(VENV), the demo data and its runs"
	@echo
	@echo "again:   the same command goes on where a run was interrupted; a complete one says so"
	@echo "watch:   $(BIN)/tensorboard --logdir runs        stop: touch runs/debug/STOP"
	@echo "change:  launch/local.sh -n 2 debug --run-dir runs/mine --set optimizer.lr=5e-4"
	@echo "learn:   $(BIN)/keye --help"

setup: $(STAMP)

# Torch first and pinned: an unpinned one may bring gigabytes of CUDA libraries to a machine without a GPU. Where pip finds a CPU
# build of this version (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), it takes that.
$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e '.[dev]' -c constraints.txt
	touch $@

data: setup
	$(BIN)/python data_tools/make_demo_data.py data/demo --train 6000 --valid 600

train: data
	launch/local.sh -n $(N) debug --run-dir runs/debug
	$(BIN)/keye eval --run-dir runs/debug

train-long: data
	launch/local.sh -n $(N) debug_long --run-dir runs/debug_long
	$(BIN)/keye eval --run-dir runs/debug_long

test: setup
	$(BIN)/python -m pytest -q -n $(N) --dist worksteal -m "not gpu and not slow and not slurm" tests

test-dali: setup
	$(BIN)/pip install -q -e '.[dali]' -c constraints.txt
	$(BIN)/python -m pytest -q tests/unit/data/media/test_dali_library.py

test-slow: setup
	$(BIN)/python -m pytest -q -m "slow and not slurm" tests

chaos: setup
	$(BIN)/python -m tests.chaos --seed $(SEED) --lives $(LIVES)

slurm-drills: setup
	$(BIN)/python -m pytest -q -m slurm tests/slurm

slurm-drills-fast: setup
	$(BIN)/python -m pytest -q -m "slurm and not slow" tests/slurm

smoke: data
	launch/smoke_2gpu.sh

lint: setup
	$(BIN)/ruff check .
	@if command -v shellcheck >/dev/null; then shellcheck launch/*.sh launch/*.sbatch .ci/run; else echo "shellcheck is not installed: launchers not checked"; fi

clean:
	rm -rf $(VENV) data/demo runs/debug runs/debug_long build *.egg-info
