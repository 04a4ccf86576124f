# `make demo`, `make test`, `make test-all`, `make lint`. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Each worker takes whole files, in order: those of tests/distributed, which take longest, first.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo install test test-all lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The stamps install again when the project's requirements change.
$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[vision,report]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Without a number of threads, `accelerate launch` takes one.
demo: $(VENV)/demo.stamp
	threads=$${OMP_NUM_THREADS:-$$($(BIN)/python -c "import psutil; print(psutil.cpu_count(logical=False) or 1)")}; \
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file accelerate_configs/single_gpu.yaml \
	    --num_cpu_threads_per_process $$threads recipes/kure_resnet50.py --overwrite

install: $(VENV)/dev.stamp

test: $(VENV)/dev.stamp
	$(PYTEST)

test-all: $(VENV)/dev.stamp
	$(PYTEST) -m ""

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) outputs
