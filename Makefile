# One line each; anything with a condition belongs in Python.
.PHONY: help install demo figures test test-all faults check bench bench-profile bench-gpu mutants algorithms clean
export OMP_NUM_THREADS ?= 2
BIN := .venv/bin

help: ## this list
	@grep -E '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | expand -t 12

install: .venv/installed ## make .venv from the locked versions, once

demo: install ## train the default chain on CPU and draw its frontier (about 5 minutes)
	$(BIN)/rlhf train algo=p3o_v2 data=hh && $(BIN)/rlhf frontier

fig-%: install ## draw one figure of a paper, fig-p3o-hh; RUN=1 makes the runs it lacks
	$(BIN)/rlhf figure $(subst -,_,$*) $(if $(RUN),--run)

figures: install ## make runs that figures lack, for 3 hours at most, and draw all that can be; again to go on
	$(BIN)/rlhf figure all --run --hours 3

test: install ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: install ## the same, and what takes minutes (two hosts: needs root)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not faults"

faults: install ## inject every fault, and see what comes of each
	OMP_NUM_THREADS=1 $(BIN)/python scripts/faults.py

check: install ## lint, format and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: install ## race this project against TRL, a bare loop and the machine, and write docs/results/speed.md
	$(BIN)/python -m benchmarks --page docs/results/speed.md

bench-profile: install ## where a training step spends its time, beside what the machine could do
	$(BIN)/python -m benchmarks.profile

bench-gpu: ## measure one CUDA GPU in 8 minutes, into build/gpu
	bash benchmarks/gpu.sh

mutants: install ## plant errors in the mathematics; every one must be caught
	$(BIN)/python scripts/mutants.py

algorithms: install ## write docs/algorithms from the yaml and the docstrings
	$(BIN)/python scripts/algorithms.py

clean: ## remove caches and builds; runs and figures stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/installed: requirements.lock pyproject.toml
	python3 -m venv .venv && $(BIN)/pip install -q -r requirements.lock && $(BIN)/pip install -q --no-deps --no-build-isolation -e . && touch $@
