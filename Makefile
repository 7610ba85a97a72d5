# The two commands are `make matrix` and `make test`; both set up everything they need.
# Arguments go through ARGS:  make matrix ARGS="--only v73"   make unit ARGS="-k registry"

VENV  ?= .venv
ARGS  ?=
BIN   := $(VENV)/bin
STAMP := $(VENV)/.mtbuild-setup
TEST  := $(BIN)/python -m pytest -q --durations=5
export VENV

.DEFAULT_GOAL := help
.PHONY: help setup matrix test lint unit test-wan e2e gpu doctor engine engine-down clean-engine test-programs

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

matrix: setup  ## the main job: plan, build, prove and publish every cell of matrix.yaml
	$(BIN)/mtbuild matrix $(ARGS)

test: setup  ## all tests, stage by stage, with their times
	@MAKE="$(MAKE)" tools/bootstrap/stages.sh lint unit test-wan e2e

lint: setup  ## Ruff, formatting, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check tools tests benchmarks
	$(BIN)/mypy

# The savers and the runtime write real videos in their tests.
test-programs:
	@tools/bootstrap/packages.sh ffmpeg=ffmpeg

unit: setup test-programs  ## fast tests of mtbuild and the runtime, without engine
	$(TEST) tests --ignore=tests/wan -m "not engine and not gpu" $(ARGS)

test-wan: setup test-programs  ## tests of the model
	$(TEST) tests/wan -m "not engine and not gpu" $(ARGS)

e2e: setup engine  ## tests on the real engine: base, builds, smoke, publish, the journey
	$(TEST) tests/tools tests/e2e -m "engine and not gpu" $(ARGS)

gpu: setup  ## tests that need a GPU on this machine
	$(TEST) tests -m gpu $(ARGS)

doctor: setup  ## check this machine: engine, buildx, disk, GPU, driver
	$(BIN)/mtbuild doctor $(ARGS)

engine: setup  ## start the embedded engine and registry (or say which engine is used)
	$(BIN)/mtbuild engine start

engine-down: setup  ## stop them; images and published tags stay
	$(BIN)/mtbuild engine stop

clean-engine: setup  ## stop them and remove the engine with all its images and programs
	$(BIN)/mtbuild engine clean --yes

setup: $(STAMP)  ## Python, virtual environment, all packages (done once)

$(STAMP): pyproject.toml tools/pyproject.toml tools/bootstrap/setup.sh tools/bootstrap/packages.sh
	@tools/bootstrap/setup.sh
	@touch $@
