PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
DEMO = build/demo

.PHONY: demo test proofs bench lint format clean

# Each stamp is made once, so that a second run needs no network.
$(VENV)/.runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.tests: tests/requirements.txt $(VENV)/.runtime
	$(RUN) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# A small random policy, written as an HF checkpoint, scores a question about a picture, and then
# writes turns of its own (they are noise: nothing has been learned).
demo: $(VENV)/.runtime
	$(RUN) -m mmsr1_jax.tiny --out=$(DEMO)/policy
	$(RUN) -m mmsr1_jax.score --config=configs/tiny.py --model=$(DEMO)/policy \
	    --conversations=docs/demo/question.jsonl --out=$(DEMO)/scores.jsonl
	$(RUN) -m mmsr1_jax.infer --config=configs/tiny.py --model=$(DEMO)/policy \
	    --config.sampling.temperature=1 \
	    --image=docs/demo/bridge.jpg --question="Why is the bridge red?" \
	    --tools.index=docs/demo/index

test: $(VENV)/.tests lint
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes too long for every day.
proofs: $(VENV)/.tests
	$(RUN) -m pytest -m proof

lint: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.tests
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.tests
	$(RUN) -m tests.bench.model
	$(RUN) -m tests.bench.rollout
	$(RUN) -m tests.bench.tools
	$(RUN) -m tests.bench.update
	$(RUN) -m tests.bench.tools --reader=jina

clean:
	rm -rf $(VENV) build
