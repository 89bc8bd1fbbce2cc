# Every way of working with a checkout; `make help` lists them. Each target sets up what it needs by itself.

PYTHON ?= python3
WORKERS ?= 2
PRESET ?= tiny
WEIGHTS ?=
WORK ?= runs/tiny

BIN := .venv/bin
TREE := build/tree
# Newer than pyproject.toml when the environment fits it.
STAMP := .venv/ready

export TORCH_BUILD TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help setup server serving demo test lint typecheck contracts tree unit slow aot native bench weights clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "settings: PYTHON=python3 (for .venv), TORCH_BUILD=cpu|cuda, TORCH_INDEX=URL, PRESET, WEIGHTS, WORKERS, NO_SERVER=1, CMAKE_FLAGS"

setup: ## make .venv with the fssdeploy command, for export, training, OpenVINO, serving and tests
	@rm -f $(STAMP)
	$(PYTHON) tools/setup.py
	@touch $(STAMP)

$(STAMP): pyproject.toml tools/setup.py
	$(PYTHON) tools/setup.py
	@touch $@

# Tests of the real server need it. Without a network they are skipped, and say so.
server: $(STAMP)
ifndef NO_SERVER
	@$(BIN)/fssdeploy serve --setup || echo "THE REAL SERVER WILL NOT BE TESTED: its environment could not be made"
endif

serving: $(STAMP) ## make the private environment of the Triton server (FSSDEPLOY_SERVING=DIR)
	$(BIN)/fssdeploy serve --setup

demo: $(STAMP) ## export, prove the export, enrol and segment into demo_out (PRESET=tiny WEIGHTS=)
	$(BIN)/fssdeploy demo --export --preset $(PRESET) $(foreach file,$(WEIGHTS),--weights "$(file)") --out demo_out

test: lint typecheck contracts server unit ## lint, types, import contracts and the tests, the real server's among them

lint: $(STAMP) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: tree ## types
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fssdeploy

contracts: tree ## which part may import which
	cd $(TREE) && ../../$(BIN)/lint-imports --config ../../pyproject.toml --cache-dir ../../.import_linter_cache

tree: $(STAMP)
	@$(BIN)/python tools/link_tree.py

# Neighbouring tests start in the same process, so most of what they share is made once.
unit: $(STAMP) ## the tests alone (WORKERS=2 processes); with the real server where its environment is
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal

slow: $(STAMP) ## full-size networks and long runs as well
	$(BIN)/pytest -q -m ""

aot: $(STAMP) ## compile the GPU kernels for all architectures with every supported Triton, and check them
	$(BIN)/python tools/aot.py

native: $(STAMP) ## build and test the compiled parts that this machine has the means for (CMAKE_FLAGS=-D...)
	cmake -S . -B build/native $(CMAKE_FLAGS)
	cmake --build build/native --parallel $(WORKERS)
	ctest --test-dir build/native --output-on-failure

bench: $(STAMP) ## time the stages and the operations, against the last saved run
	$(BIN)/pytest -q benchmarks/test_stages.py benchmarks/test_operations.py \
		--benchmark-only --benchmark-autosave --benchmark-storage=.benchmarks \
		$(if $(wildcard .benchmarks/*/*.json),--benchmark-compare)

weights: $(STAMP) ## train the shipped weights anew, with their figures (WORK=runs/tiny; continues)
	$(BIN)/python tools/train_tiny.py --work $(WORK) --ablation --prompted

clean: ## remove what was built; .venv stays
	rm -rf build dist demo_out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find fssdeploy kernels export serving benchmarks tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
