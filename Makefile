# On a fresh machine with Python >= 3.10 and make: `make demo`, `make test` and `make docs`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test docs style quality benchmark clean

demo: $(INSTALLED)
	$(BIN)/flowsr demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py

# The tested versions of constraints.txt, torch first: its CPU build is far smaller than what other packages would pull.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flowsr needs Python >= 3.10, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output site
