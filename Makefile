# Entry points for people; the build itself is CMake (CMakePresets.json). `make help` lists them.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

JOBS ?= $(shell nproc)
SEEDS ?= 200
FILTER ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTHON ?= python3
WHEEL_ARGS ?=
# The CUDA half is built for demo and bench where it can run: a GPU and nvcc are here.
HAVE_GPU := $(shell nvidia-smi -L 2> /dev/null | grep -q 'GPU 0' && \
	(command -v nvcc > /dev/null || test -x $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc) && echo yes)
PRESET ?= $(if $(HAVE_GPU),cuda-release,cpu-release)

RUN_TESTS = tools/run_tests.py --jobs $(JOBS) --seeds $(SEEDS) $(if $(FILTER),--filter '$(FILTER)')

.PHONY: help demo bench build test test-cpu test-asan test-tsan test-chaos test-rxe test-python \
	wheel build-cuda chaos mutation lint lint-only format setup clean

help: ## this list
	@echo "usage: make TARGET [JOBS=n] [FILTER=regex] [SEEDS=n] [DEMO_ARGS='...'] [PRESET=...]"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14 | sed 's/^/  /'

demo: build ## the main job: 4 ranks run a mixture-of-experts layer over a text (DEMO_ARGS passes on)
	build/$(PRESET)/bin/mscclpp-ep demo $(DEMO_ARGS)

bench: build ## times dispatch and combine against a plain copy (BENCH_ARGS passes on)
	build/$(PRESET)/bin/mscclpp-ep bench $(BENCH_ARGS)

build: ## installs what is missing and builds the program mscclpp-ep (PRESET=cuda-release forces CUDA)
	@tools/setup.sh demo
	@echo "[build] preset $(PRESET)$(if $(HAVE_GPU),, (no GPU with nvcc here: CPU platform))"
	@cmake --preset $(PRESET) --log-level=$(if $(wildcard build/$(PRESET)/build.ninja),WARNING,STATUS) \
		$(if $(wildcard build/$(PRESET)/build.ninja),,-DMSCCLPP_BUILD_TESTS=OFF)
	@cmake --build build/$(PRESET) -j $(JOBS) --target mscclpp-ep

test: ## what CI runs: lint, C++ tests (plain, 200 chaos seeds, ASan, TSan), RDMA in a virtual machine, Python, CUDA compiles
	@tools/setup.sh test
	@$(RUN_TESTS)

test-cpu: ## C++ tests, plain
	@tools/setup.sh test
	@$(RUN_TESTS) cpu

test-asan: ## C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer
	@tools/setup.sh test
	@$(RUN_TESTS) asan

test-tsan: ## C++ tests with ThreadSanitizer
	@tools/setup.sh test
	@$(RUN_TESTS) tsan

test-chaos chaos: ## chaos schedules, SEEDS=200 of them per test
	@tools/setup.sh test
	@$(RUN_TESTS) chaos

test-rxe: ## the transport verbs and calls between nodes over soft-RoCE, in a small virtual machine (tools/rxe_vm)
	@tools/setup.sh test
	@$(RUN_TESTS) rxe

test-python: ## makes .venv, installs the package into it, pytest
	@tools/setup.sh test
	@$(RUN_TESTS) python

wheel: ## a wheel in dist/ for PYTHON=python3; with CUDA if nvcc is here (WHEEL_ARGS passes on)
	@tools/setup.sh demo
	$(PYTHON) -m pip wheel . --no-deps -w dist --config-settings=build-dir=build/wheel-{cache_tag} $(WHEEL_ARGS)

build-cuda: ## compiles the CUDA half for every architecture we claim; runs its tests if there is a GPU
	@tools/setup.sh test
	@$(RUN_TESTS) cuda

mutation: ## removes and weakens synchronisation lines in the kernels: does a test notice?
	@tools/setup.sh test
	@python3 tools/mutation.py --jobs $(JOBS) $(MUTATION_ARGS)

lint: ## formatting, names, project rules, every public header alone (what pre-commit and CI check)
	@tools/setup.sh test
	@$(MAKE) --no-print-directory lint-only

lint-only:
	@python3 tools/lint.py --jobs $(JOBS)

format: ## formats the C++ sources in place
	@tools/setup.sh test
	@python3 tools/lint.py --fix-format

setup: ## installs everything that any target needs, .venv included
	@tools/setup.sh venv

clean: ## removes build/ (not .venv)
	rm -rf build
