# make demo | test | lint: each works from a fresh clone.

PYTHON := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: demo test lint

demo: $(INSTALLED)
	$(PYTHON) -m examples.demo --output demo

test: lint
	$(PYTHON) -m pytest -q

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .

# torch first and exact: left to the resolver, a newer torch would bring gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install -c constraints.txt -e '.[test]'
	touch $@
