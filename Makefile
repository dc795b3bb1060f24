PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
DEMO = build/demo
WARM_START = mmsr1_jax/data/tiny_world/policy

.PHONY: demo warm_start test proofs bench plan docs lint format clean

# A stamp marks installed packages, so that a second run needs no network.
$(VENV)/.runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.tests: tests/requirements.txt $(VENV)/.runtime
	$(RUN) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# Trains a small policy to search a small world (minutes on two cores), and compares its answers
# before and after. With large pages of memory, programs that allocate much of it are a tenth faster.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: $(VENV)/.runtime
	$(RUN) -m mmsr1_jax.scripts.tiny_world --sft_examples=0
	$(RUN) -m mmsr1_jax.evaluate --config=configs/tiny.py --model=$(WARM_START) \
	    --config.eval.workflows="('on_demand',)" --out=$(DEMO)/before
	$(RUN) -m mmsr1_jax.train --config=configs/tiny.py --workdir=$(DEMO)/run
	$(RUN) -m mmsr1_jax.evaluate --workdir=$(DEMO)/run \
	    --config.eval.workflows="('direct', 'rag', 'on_demand', 'agent')" --out=$(DEMO)/after
	$(RUN) -m mmsr1_jax.scripts.demo --before=$(DEMO)/before --after=$(DEMO)/after \
	    --runs=$(DEMO)/run --png=$(DEMO)/curves.png

# Retrains the initial policy of the demo (about an hour): first reading, then facts.
warm_start: $(VENV)/.runtime
	rm -rf build/tiny_warm_start build/tiny_warm_start_facts
	$(RUN) -m mmsr1_jax.scripts.tiny_world
	$(RUN) -m mmsr1_jax.sft --config=configs/tiny.py:warm_start
	$(RUN) -m mmsr1_jax.sft --config=configs/tiny.py:warm_start_facts
	rm -rf $(WARM_START)
	cp -r build/tiny_warm_start_facts/policy $(WARM_START)

test: $(VENV)/.tests lint
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Tests that take too long for every day, and the tests of numbers with programs that are compiled
# as users run them; rollouts also with the kernels of TPUs and GPUs, interpreted.
proofs: $(VENV)/.tests
	$(RUN) -m pytest -m proof
	OPTIMIZED=1 $(RUN) -m pytest tests/models tests/rl tests/rollout
	$(RUN) -m pytest --kernels=tpu tests/rollout
	$(RUN) -m pytest --kernels=gpu tests/rollout

lint: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/pyright

format: $(VENV)/.tests
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.tests
	$(RUN) -m tests.bench.model
	$(RUN) -m tests.bench.rollout
	$(RUN) -m tests.bench.tools
	$(RUN) -m tests.bench.update
	$(RUN) -m tests.bench.tools --reader=jina

# Plans of the shipped configs, compiled for accelerators that are not there; the tables of
# docs/performance.md. Needs the extras `tpu` and `cuda`. Figures are cached, so it can be resumed.
plan: $(VENV)/.runtime
	mkdir -p build/plan
	set -e; for config in qwen3b qwen7b qwen7b_lora; do for target in v5p:2x2x2 h100:1x8; do \
	    $(RUN) -m mmsr1_jax.scripts.plan --config=$$config --topology=$$target --json \
	        > build/plan/$$config.$$target.json; \
	done; done
	$(RUN) docs/plan_tables.py build/plan docs/performance.md

# The pages under docs/ as a site, in docs/_build; warnings are errors.
$(VENV)/.docs: docs/requirements.txt $(VENV)/.runtime
	$(RUN) -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

docs: $(VENV)/.docs
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build

clean:
	rm -rf $(VENV) build docs/_build docs/settings.md
