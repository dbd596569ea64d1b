# `make demo` and `make test` need nothing but Python >= 3.10 with venv: they create .venv and install what is pinned.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/python data/make_tiny.py
	$(BIN)/python model_zoo/SDCNv3/run_expid.py --config model_zoo/SDCNv3/config --expid SDCNv3_tiny --gpu -1
	$(BIN)/ctrbench leaderboard runs/tiny_ctr

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first, in its pinned version, so that nothing else picks another build of it.
$(READY): requirements.lock setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
