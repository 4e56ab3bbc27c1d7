# Each target makes the virtual environment it needs when it is missing, and prints what it does.
VENV ?= .venv
CORES := $(shell getconf _NPROCESSORS_ONLN)
PYTHON ?= python3
BACKBONE ?= data/tiny-clip-t5
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

unexport PYTHONDONTWRITEBYTECODE  # programs that tests start would compile everything anew

.PHONY: vqa test lint compare docs clean
.DEFAULT_GOAL := vqa

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(STAMP)

data/easy-vqa: | $(STAMP)
	$(BIN)/python scripts/prepare_data.py easy-vqa --output_dir data/easy-vqa

data/scenes: | $(STAMP)
	$(BIN)/python scripts/prepare_data.py scenes --output_dir data/scenes

data/concepts: | $(STAMP)
	$(BIN)/python scripts/prepare_data.py concepts --output_dir data/concepts

data/snippets: | $(STAMP)
	$(BIN)/python scripts/prepare_data.py snippets --output_dir data/snippets

vqa: $(STAMP) | data/easy-vqa  ## install, fetch easy-VQA, train a prompt on it, show what it answers; or BACKBONE=data/tiny-clip-bart
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) \
		scripts/train_vqa.py --config data/configs/easy-vqa.json --backbone $(BACKBONE) \
		--output_dir runs/easy-vqa-$(notdir $(BACKBONE)) --resume auto

compare: $(STAMP) | data/easy-vqa data/scenes data/concepts data/snippets  ## the README's comparison of methods
	$(BIN)/python scripts/compare.py

LINT := $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports --no-logo && $(BIN)/mypy

lint: $(STAMP)
	$(LINT)

# One worker more than cores, because tests wait for the programs that they start.
test: $(STAMP)  ## install, check style and types, run the tests; style and types meanwhile, told at the end
	@log=$$(mktemp); ($(LINT)) >$$log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n $$(($(CORES) + 1)) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$lint; lint=$$?; cat $$log; rm $$log; \
	test $$tests = 0 && test $$lint = 0

docs: $(STAMP)  ## the API reference into docs/; an undocumented public name is an error
	$(BIN)/ruff check dept_vl
	$(BIN)/pdoc --docformat google --output-directory docs dept_vl

clean:
	rm -rf $(VENV) docs data/easy-vqa data/scenes data/concepts data/snippets
