# make quickstart   set up .venv, train on the embedded dataset for about three minutes, score, show where to look
# make test         set up .venv, run the tests
# PYTHON=python3.12 make ...   to choose the interpreter (3.10 to 3.13)
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/shapes/quickstart

.PHONY: quickstart test lint models clean

$(BIN)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), "seglight needs Python 3.10 to 3.13, this is " + sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

quickstart: $(BIN)/.installed
	$(BIN)/seglight fit -c experiments/shapes/quickstart.yaml --out $(RUN) --overwrite
	$(BIN)/seglight test --ckpt_path $(RUN)/checkpoints/best.ckpt

test: $(BIN)/.installed
	$(BIN)/python -m pytest

lint: $(BIN)/.installed
	$(BIN)/ruff check .

# run the fidelity tests and write the table of architectures into the README
models: $(BIN)/.installed
	mkdir -p build
	$(BIN)/python -m pytest -m "fidelity and not slow and not gpu" --junitxml build/fidelity.xml
	$(BIN)/seglight models --fidelity build/fidelity.xml --readme README.md

clean:
	rm -rf .venv build seglight.egg-info
