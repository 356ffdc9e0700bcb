# One entry to everything. `make demo` and `make test` need only Python 3.10+, a C++ compiler and (for the kernels) nvcc:
# they make their own virtual environment and build the extension first.
#
#   make demo ARGS="--text my.txt"      make test ARGS="tests/test_plan.py -k slots"

# The first Python that is recent enough; override with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
            $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done)
ifeq ($(strip $(PYTHON)),)
$(error Python 3.10 or later with the venv module is needed and none was found on the path)
endif

VENV_PYTHON := .venv/bin/python
CMAKE_BUILD := build/cmake
ARGS ?=
# cmake and ninja of the environment come first where the system has none.
export PATH := $(PATH):$(CURDIR)/.venv/bin
CPP_SOURCES = $(shell find csrc bench tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help env env-ci env-cmake build demo test gpu-test gpu-round sanitize board lint format cmake kernel-report wheel clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

env: ## Make the virtual environment .venv
	@$(PYTHON) tools/environment.py --group dev

env-ci:
	@$(PYTHON) tools/environment.py --group dev --group ci

env-cmake:
	@$(PYTHON) tools/environment.py --group dev --group cmake

build: env ## Build the PyTorch extension in place
	@$(VENV_PYTHON) tools/build_extension.py

demo: build ## Run the main job on a text (ARGS="--text FILE --plot out.png")
	$(VENV_PYTHON) -m kda_cuda demo $(ARGS)

test: build ## Run the tests; those that need a GPU skip where there is none (ARGS="tests/test_plan.py -x")
	$(VENV_PYTHON) -m pytest $(ARGS)

gpu-test: build ## Run only the tests that need a GPU
	$(VENV_PYTHON) -m pytest -m gpu $(ARGS)

gpu-round: build ## All that only a GPU can tell: GPU tests, sanitizers, board (ARGS="--skip board")
	$(VENV_PYTHON) tools/gpu_round.py $(ARGS)

sanitize: build ## Run compute-sanitizer's four tools on small calls of all kernels
	$(VENV_PYTHON) tools/gpu_round.py --only sanitizer $(ARGS)

board: build ## Time all shapes beside the peers on a GPU (ARGS="--quick"); then: python -m bench.report
	$(VENV_PYTHON) -m bench.board $(ARGS)

lint: env-ci ## Check Python with ruff and C++ with clang-format
	$(VENV_PYTHON) -m ruff check .
	.venv/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

format: env-ci ## Format C++ and fix what ruff can fix
	.venv/bin/clang-format -i $(CPP_SOURCES)
	$(VENV_PYTHON) -m ruff check --fix .

cmake: env-cmake ## Build the torch-free library, the benchmark and the planner module with CMake
	cmake -S . -B $(CMAKE_BUILD) $(if $(wildcard $(CMAKE_BUILD)/CMakeCache.txt),,-G Ninja) \
	  -DPython3_EXECUTABLE=$(CURDIR)/$(VENV_PYTHON) -DKDA_BUILD_PYTHON=ON
	cmake --build $(CMAKE_BUILD)

kernel-report: env-ci build ## Check registers, spills and instructions of every compiled kernel
	$(VENV_PYTHON) tools/kernel_report.py kda_cuda/_C.abi3.so $(ARGS)

wheel: build ## Build the abi3 wheel into dist/
	$(VENV_PYTHON) -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

clean: ## Remove everything that was built, .venv included
	rm -rf .venv build dist kda_cuda/_C*.so *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
