# One command each: `make demo` trains and evaluates the small lens, `make test` runs the tests. Both install into .venv first.

PYTHON := $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JOBS ?= 1
WORKERS ?= 2
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

# Large logits are otherwise mapped and unmapped by glibc at every step, which costs several times the arithmetic.
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export MALLOC_TRIM_THRESHOLD_ = 8589934592

# deepspeed compiles what it needs when it is used; installing it needs no compiler.
export DS_BUILD_OPS = 0

# Everything is said, threads too: accelerate warns of each default, and its default for a CPU is one thread.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)

.PHONY: help venv demo best objectives tuned-lens keep test test-slow lint format bench bench-gpu cards docs clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       train and evaluate the lens of the embedded story model (outputs/tiny_stories)'
	@echo 'make best       the best lens of that model, three seeds, up to half an hour each;  make objectives: compare objectives'
	@echo 'make tuned-lens fit, judge and plot the tuned lens of that model (outputs/tuned_lenses)'
	@echo 'make test       run the tests;  make test-slow: the slow ones too'
	@echo 'make lint       check style and types;  make format: mend what can be mended'
	@echo 'make bench      run the benchmarks (tests/benchmarks/results);  make bench-gpu: steps and caches on GPUs (writes docs/gpu.md)'
	@echo 'make cards      write README.md and the cards in model_cards/ from what is kept there'
	@echo 'make keep       keep there what make demo and make tuned-lens left in outputs/'
	@echo 'make docs       build the site of docs/ (site/index.html)'
	@echo 'make clean      remove .venv, caches and build leftovers; outputs stay'

venv: $(INSTALLED)

$(INSTALLED): setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lora,plots,lint]'
	touch $@

demo: $(INSTALLED)
	$(LAUNCH) examples/train_lens.py --config examples/recipes/tiny_stories.yaml

best objectives: $(INSTALLED)
	$(BIN)/python model_cards/measure.py $@ --jobs $(JOBS)

TUNED_LENS := outputs/tuned_lenses/tiny_stories

tuned-lens: $(INSTALLED)
	$(BIN)/consistency-lens tuned-lens fit --config examples/recipes/tuned_lens/tiny_stories.yaml
	$(BIN)/consistency-lens tuned-lens gates --lens $(TUNED_LENS) --suite stories --gates A C D
	$(BIN)/consistency-lens tuned-lens sweep --model examples/tiny_stories --lens $(TUNED_LENS) --tuned require \
		--suite stories --output_dir $(TUNED_LENS)/sweep
	$(BIN)/consistency-lens tuned-lens plot --records $(TUNED_LENS)/sweep

keep: $(INSTALLED)
	$(BIN)/python model_cards/keep.py

# Tiny models are slower on several threads than on one, so the tests run side by side instead; each process takes
# files in one piece while it can, for the tests of a file share what is slow to make.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One after the other: two at once would measure each other.
bench: $(INSTALLED)
	@for script in $$(grep -l '__main__' tests/benchmarks/*.py | grep -v -e gpu_step -e tuned_lens_peer); do $(BIN)/python $$script || exit 1; done

# What is compiled comes last, for it takes minutes to compile; what does not fit a device keeps nothing else back.
bench-gpu: $(INSTALLED)
	@$(BIN)/python -c "import torch, sys; torch.cuda.is_available() or sys.exit('bench-gpu: there is no GPU here')"
	@steps="$(BIN)/torchrun --nproc_per_node gpu tests/benchmarks/gpu_step.py"; status=0; \
	$$steps --modes eager in_place || status=1; \
	$(BIN)/python tests/benchmarks/cache_vs_bare_forward.py || status=1; \
	$$steps --modes compile || status=1; exit $$status

cards: $(INSTALLED)
	$(BIN)/python model_cards/render.py

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
