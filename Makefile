# Two commands matter: `make demo` and `make test`. Both set up .venv on their first run and reuse it afterwards.
PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPP := $(wildcard megatron/core/datasets/*.cpp $(addprefix megatron/core/fusions/kernels/cpu/*.,cpp h py))
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

# An environment made in another folder, or whose Python is gone, does not count as installed.
INSTALLED_AT := $(shell $(BIN)/python -c 'print(open("$(STAMP)").read())' 2>/dev/null)
ifneq ($(INSTALLED_AT),$(CURDIR))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test verify test-all doctor gpu check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.12  use that Python     PIP_FLAGS='...'  more options for pip install"
	@echo "  ARGS='...'         more options for the demo or for pytest, as in: make test ARGS='-k router'"
	@echo "  FUZZ_SECONDS=600   how long make verify damages the files of each parser; a minute if not given"

install: $(STAMP) ## make .venv from the pinned versions, unless it is there and up to date
	@echo "$(VENV) is ready"

$(STAMP): constraints.txt pyproject.toml $(wildcard setup.py) $(CPP)
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "error: there is no '$(PYTHON)' here: install Python 3.10 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("error: $(PYTHON) is Python %d.%d, but 3.10 or newer is needed: name one with PYTHON=..." % v[:2])'
	@[ "$(INSTALLED_AT)" = "$(CURDIR)" ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; "$(PYTHON)" -m venv --clear $(VENV); }
	$(PIP_INSTALL) setuptools wheel pybind11
	$(PIP_INSTALL) --no-build-isolation -e '.[dev,data,demo,tensorboard]'
	@printf %s "$(CURDIR)" > $@

demo: $(STAMP) ## all steps on real text: data, model, training, back to Hugging Face (ARGS='--help')
	@$(BIN)/python tools/demo/run.py $(ARGS)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(ARGS)

verify: $(STAMP) ## every layout, kernels for every GPU, a pretended GPU, every parser against damage (about an hour on two cores)
	$(BIN)/python -m pytest -m 'not gpu' tests/conformance tests/distributed tests/kernels tests/pretended tests/fuzz $(ARGS)

test-all: $(STAMP) ## run the tests, the slow ones too
	$(BIN)/python -m pytest -m 'not gpu' $(ARGS)

doctor: ## what would keep training from running, or running fast, on this machine (ARGS='--help'); installs nothing
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/doctor.py $(ARGS)

gpu: ## check this machine's GPUs in 8 minutes: kernels, numbers, layouts, speed (ARGS='--help'); installs nothing
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_check.py $(ARGS)

check: $(STAMP) ## ruff (style and formatting) and mypy (types)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron tools $(wildcard pretrain_gpt.py)

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, built files, caches and the demo's output
	rm -rf $(VENV) build demo *.egg-info .pytest_cache .ruff_cache .mypy_cache megatron/core/datasets/*.so megatron/core/fusions/kernels/cpu/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
