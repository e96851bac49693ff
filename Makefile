# `make demo` trains, evaluates, improves and samples a small model; `make test` checks everything; `make oracles`
# adds the PyTorch originals that some tests compare with.
PYTHON ?= python3
VENV ?= .venv
RUN := $(abspath $(VENV))/bin
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check
WORKDIR ?= runs/digits_edm
WORKERS ?= 2

.PHONY: demo test lint oracles studies clean

demo: $(VENV)/.installed
	$(RUN)/python -m experiments.train --config=configs/digits_edm.py --workdir=$(WORKDIR)
	$(RUN)/python -m experiments.evaluate --checkpoint=$(WORKDIR)
	$(RUN)/python -m experiments.train --config=configs/digits_ddo.py --config.base=$(WORKDIR) --workdir=$(WORKDIR)_ddo
	$(RUN)/python -m experiments.sample --checkpoint=$(WORKDIR)_ddo --before=$(WORKDIR) --num=80 --out=$(WORKDIR)_ddo/samples.png

test: $(VENV)/.tested-with lint
	$(RUN)/python -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder

lint: $(VENV)/.tested-with
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

oracles: $(VENV)/.oracles

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: '$(PYTHON)' is missing: install Python 3.11 or newer, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$($(PYTHON) --version) is too old: Python 3.11 or newer is needed (make PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: this Python has no venv: install it (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	@echo "Installing genjax_lab into $(VENV) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.tested-with: $(VENV)/.made pyproject.toml
	@echo "Installing genjax_lab and its test tools into $(VENV) ..."
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.oracles: $(VENV)/.tested-with
	@echo "Installing the original packages that tests compare with into $(VENV) ..."
	$(PIP) --editable '.[test,oracles]'
	# What these require (an old numpy; torchvision) is not needed for the networks that tests read.
	$(PIP) --no-deps nvidia-modulus==0.5.0 nvtx torch-fidelity==0.4.0 treelib
	# Built without CUDA, against the PyTorch that is there.
	$(PIP) --no-deps --no-build-isolation natten==0.21.7
	@touch $@

clean:
	rm -rf $(VENV) runs
