# All that there is to do here, from a fresh clone, with nothing but Python 3.11 or newer and make:
#   make compare      make test      make help
#
# The first target you run sets up .venv, once; that downloads packages and is all that needs a network.
# All versions are pinned in constraints.txt, made by `make lock`; change it or pyproject.toml and the next make brings
# .venv up to date.
#
#   PYTHON=python3.12           another interpreter to build .venv with
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                               CPU-only torch: a smaller download on Linux (elsewhere it is what you get anyway)
#   ARGS="--seeds 0 1 2"        more options for `make compare`, `make anywhere` and `make lock`

PYTHON      ?= python3
TORCH_INDEX ?=
ARGS        ?=

PY    := .venv/bin/python
QUIET := TQDM_DISABLE=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
READY := .venv/.ready
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)

# Threads that wait for work sleep instead of spinning: beside another busy process spinning makes training many times
# slower. What you have set yourself stays.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup compare test anywhere bench figures notebooks slides lint lab lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## build .venv (once; every other target does it for you)

# torch comes first and by itself, so that TORCH_INDEX decides its build and nothing else's.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older or missing: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up .venv: downloads once and needs the network; later runs do neither."
	$(PYTHON) -m venv .venv
	$(PY) -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PY) -m pip install -c constraints.txt -e ".[notebooks,test,kernels]"
	@touch $(READY)

compare: $(READY)  ## quantize the bundled model to 2 bits by every method and print one table
	$(PY) -m lcqat_min compare $(ARGS)

test: $(READY)  ## run the unit tests, list the lines that none of them reaches, then run every notebook
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -n 2 --dist loadfile
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report
	$(QUIET) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=300 notebooks

anywhere: $(READY)  ## run the tests as on other machines: instruction sets, threads, text, versions (an hour)
	$(PY) scripts/anywhere.py $(ARGS)

bench: $(READY)  ## measure what training costs on this CPU, in ratios
	$(PY) scripts/bench_cpu.py $(ARGS)

figures: $(READY)  ## draw all pictures again: those of results/ and those of the notebooks
	$(PY) scripts/figures.py
	LCQAT_FIGURES=1 $(PY) scripts/notebooks.py

notebooks: $(READY)  ## run the notebooks from top to bottom and store their outputs
	$(PY) scripts/notebooks.py

slides: $(READY)  ## HTML slides of the notebooks, in runs/slides/
	$(PY) scripts/notebooks.py --slides

lint: $(READY)  ## check style, layout and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

lab: $(READY)  ## open the notebooks
	TQDM_DISABLE=1 $(PY) -m jupyter lab notebooks

lock: $(READY)  ## pin all packages in constraints.txt again (ARGS=--upgrade: at their newest versions)
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
	  --custom-compile-command "make lock" $(ARGS) pyproject.toml --output-file constraints.txt

clean:  ## delete caches and build leftovers; .venv, runs/ and results/ stay
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist
