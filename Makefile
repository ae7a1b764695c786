# make demo | test | slow-tests | lint | smollm2 | common-tests | pipeline-tests | diffusers-tests | compat | wheel-tests |
# doors | docs: each works from a fresh clone.

PYTHON := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: demo test tests slow-tests lint smollm2 common-tests pipeline-tests diffusers-tests compat wheel-tests doors doors-clients doors-lmms docs

demo: $(INSTALLED)
	$(PYTHON) -m examples.demo --output demo

# SmolLM2-135M-Instruct around the emoji checkpoint's vision tokenizer, trained to draw; goes on where it was stopped
smollm2: $(INSTALLED) | runs/emoji/data
	$(PYTHON) -m pip install -c constraints.txt -e '.[gguf,train]'
	PYTHONPATH=src:. $(PYTHON) -m examples.smollm2.run

runs/emoji/data: | $(INSTALLED)
	$(PYTHON) -m pip install -c constraints.txt -e '.[emoji]'
	PYTHONPATH=src:. $(PYTHON) -m examples.emoji.data --output $@

# three files at a time in the order of tests/conftest.py, one thread each: what is tested is tiny, and waits are filled.
# Bytecode is kept, also where the environment says otherwise: hundreds of processes of tests import the package
test: $(INSTALLED)
	$(MAKE) --jobs 2 lint tests

tests: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# those that take minutes each, and what others show already in a cheaper form
slow-tests: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 -m slow

# transformers' own tests, on this project's classes
common-tests: $(INSTALLED)
	$(PYTHON) -m pip install -c constraints.txt accelerate datasets httpx peft parameterized
	PYTHONPATH=src:. $(PYTHON) -m tests.common.run

# those of pipelines, and this project's own, where torchvision is, which has its own torch: in an environment apart
pipeline-tests:
	test -x .venv-pipelines/bin/python || python3 -m venv .venv-pipelines
	.venv-pipelines/bin/python -m pip install torch==2.14.1 torchvision==0.29.1
	grep -v '^torch==' constraints.txt > .venv-pipelines/constraints.txt
	.venv-pipelines/bin/python -m pip install -c .venv-pipelines/constraints.txt -e . accelerate datasets parameterized pytest
	PYTHONPATH=src:. .venv-pipelines/bin/python -m tests.common.run --pipelines

# diffusers' own tests, on this project's decoders and the stock pipelines beside them
diffusers-tests: $(INSTALLED)
	$(PYTHON) -m pip install -c constraints.txt accelerate peft parameterized
	PYTHONPATH=src:. $(PYTHON) -m tests.diffusers.common.run

# the ends of the supported ranges of versions, one environment each: docs/compatibility.md
compat: $(INSTALLED)
	$(PYTHON) -m pip install -c constraints.txt accelerate fastapi openai peft trl uvicorn
	PYTHONPATH=src:. $(PYTHON) -m tests.compat.run

# the wheel in an environment of its own, with each extra that needs no other torch: `pip check`, README and pages of docs/
WHEEL := .venv-wheel/bin/python
wheel-tests:
	rm -rf .venv-wheel
	python3 -m venv .venv-wheel
	mkdir .venv-wheel/source
	git archive HEAD | tar -x -C .venv-wheel/source
	$(WHEEL) -m pip install "$$(grep '^torch==' constraints.txt)"
	$(WHEEL) -m pip wheel --no-deps --wheel-dir .venv-wheel ./.venv-wheel/source
	for extra in '' '[gguf]' '[serve]' '[diffusers]' '[emoji]' '[docs]' '[train]' '[test]'; do \
		$(WHEEL) -m pip install -c constraints.txt "./$$(echo .venv-wheel/*.whl)$$extra" && \
		$(WHEEL) -m pip check || exit 1; \
	done
	cd .venv-wheel/source && ../bin/python -m pytest -o pythonpath=. $(LOGGED) $(SHOWN) > ../../docs/wheel.txt || (tail ../../docs/wheel.txt; false)

SHOWN := tests/test_readme.py tests/data/test_data_docs.py tests/data/test_chats.py::test_the_page_of_trainings_runs \
	tests/serving/test_answers.py::test_the_pages_examples tests/diffusers/test_nextflow_pipeline.py::test_documentation_runs

# doors by their real clients, which are downloaded; Chromium by the system's package manager (Debian: chromium)
doors: doors-clients doors-lmms

doors-clients:
	test -x .venv-doors/bin/python || python3 -m venv .venv-doors
	.venv-doors/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	grep -v '^pillow==' constraints.txt > .venv-doors/constraints.txt  # of which gradio wants an older one
	.venv-doors/bin/python -m pip install -c .venv-doors/constraints.txt -e '.[app,test]' playwright 'ray[serve]' 'transformers[serving]'
	PYTHONPATH=src:. .venv-doors/bin/python -m pytest $(LOGGED) $(CLIENTS) > docs/doors.txt || (tail docs/doors.txt; false)

# lmms-eval and torch-fidelity need torchvision, which has its own torch; both bring a folder `tests` that hides ours
doors-lmms:
	test -x .venv-lmms/bin/python || python3 -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install torch==2.14.1 torchvision==0.29.1
	grep -v '^torch==' constraints.txt > .venv-lmms/constraints.txt
	.venv-lmms/bin/python -m pip install -c .venv-lmms/constraints.txt -e '.[evaluate]' lmms-eval pytest scikit-image
	rm -rf .venv-lmms/lib/python*/site-packages/tests
	PYTHONPATH=src:. .venv-lmms/bin/python -m pytest $(LOGGED) -k 'lmms_eval or tokenizer_scores' tests/field tests/test_tokenizer_scores.py tests/test_tables.py > docs/doors-lmms.txt || (tail docs/doors-lmms.txt; false)

CLIENTS := tests/test_app.py tests/test_serve.py tests/serving tests/comfyui tests/test_export.py \
	tests/diffusers/test_nextflow_pipeline.py tests/diffusers/test_remote_code.py
LOGGED := -v --no-header -rs -W ignore

# a sample of small faults, which the tests should notice: make mutants SEED=1 NUMBER=30
SEED := 0
NUMBER := 30
mutants: $(INSTALLED)
	$(PYTHON) -m pip install -c constraints.txt cosmic-ray==8.7.0 pytest-cov==7.1.0
	$(PYTHON) -m benchmarks.mutants --seed $(SEED) --number $(NUMBER)

# the pages of docs/ as a site in runs/site
docs:
	test -x .venv-docs/bin/python || python3 -m venv .venv-docs
	.venv-docs/bin/python -m pip install mkdocs-material==9.8.2
	.venv-docs/bin/python -m mkdocs build --strict

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

# torch first and exact: left to the resolver, a newer torch would bring gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install -c constraints.txt -e '.[test]'
	touch $@
