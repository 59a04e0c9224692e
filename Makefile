# make demo, make test: all they need is Python >= 3.11, g++ and make. TORCH= names another PyTorch, PYTHON= another Python.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := Makefile setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
CPP := $(wildcard csrc/*.* csrc/*/*.* tests/emulation/*.h tests/emulation/*.cu)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder
INSTALLED := $(VENV)/installed-$(subst /,_,$(subst =,-,$(subst <,-,$(subst >,-,$(subst $() ,_,$(TORCH))))))

.PHONY: demo demo-train compare model test test-long coverage check drills lint docs bench gpu-check install

# For ninja. Not for gpu-check, whose $(PYTHON) is the user's.
demo demo-train compare model test test-long coverage check drills lint bench install: export PATH := $(abspath $(BIN)):$(PATH)

demo: install
	$(BIN)/autohdr demo

# The whole road in minutes: rooms, training, evaluation, enhancement.
demo-train: install
	$(BIN)/autohdr demo --train --out demo_train_run

# A NAFNet and a SwinIR of as many multiply-accumulates as the model of demo-train, trained on the same rooms as it; then these three,
# the first in 8 bits and as the mean of its run's best and last weights too, and the model that ships, on the rooms that were held
# out: which is worth what, in which form.
ROOMS := demo_train_run/parts
TRAINED := $(patsubst %,demo_train_run/%/checkpoint_best.safetensors,run nafnet swinir)
OF_ONE_RUN := $(patsubst %,demo_train_run/run/checkpoint_%.safetensors,best last)
CODED := demo_train_run/int8.safetensors
LEARN := autohdr train demo --train-pairs $(ROOMS)/train.jsonl --val-pairs $(ROOMS)/val.jsonl --resume auto
compare: install demo_train_run/report/report.html
	$(BIN)/$(LEARN) --out demo_train_run/nafnet --model nafnet_nano \
	  --model-args '{"encoder_blocks": [2, 2, 2], "middle_blocks": 4, "decoder_blocks": [2, 2, 2]}'
	$(BIN)/$(LEARN) --out demo_train_run/swinir --model swinir_nano --model-args '{"dim": 22}'
	$(BIN)/autohdr quantize $(firstword $(TRAINED)) --calibrate autohdr/samples --pairs $(ROOMS)/val.jsonl --out $(CODED)
	$(BIN)/autohdr compare lite $(firstword $(TRAINED)) $(CODED) $(wordlist 2,3,$(TRAINED)) --ensemble $(TRAINED) \
	  --ensemble $(OF_ONE_RUN) --average outputs weights --forms bfloat16 fast flips-2 flips-4 sharpen \
	  --cost-size 3297x2201 --pairs $(ROOMS)/test.jsonl --out demo_train_run/compare
	$(BIN)/python benchmarks/families.py demo_train_run/compare/compare.json

demo_train_run/report/report.html:
	$(MAKE) demo-train

# The weights that ship, from nothing: autohdr/models/lite.safetensors.
model: install
	$(BIN)/python -m autohdr.train.lite

# A process a core, of one thread each; tests of several threads ask for them. TESTS="not drill" takes test-long's with it: what one
# half leaves of the cores the other takes.
TESTS := not drill and not long
test: install lint
	$(PYTEST) -m "$(TESTS)"

# The same tests, and which part of autohdr/ they run, but for what they start in other processes. On Python 3.11 tracing makes
# training take a third longer.
coverage: install
	COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if hasattr(sys, "monitoring") else "ctrace")') \
	  $(PYTEST) -m "$(TESTS)" --cov --cov-report=
	@echo "Lines of autohdr/ that the tests run: $$($(BIN)/coverage report --format=total) %"

# What takes long: CUDA and Triton kernels without a GPU (emulated, interpreted, read as machine code), kernels and models as on other
# processors, wheels, exported and compiled models, training in several processes, memory as planned.
test-long: install
	$(PYTEST) -m "long and not drill"

# For daily work: lint, reference, CPU kernels, models and command line, about a minute.
check: install lint
	$(PYTEST) -m "not drill and not long" tests/kernels tests/models tests/test_cli.py tests/test_doctor.py

# Faults at full length (kills, spikes, resumed runs: docs/reliability.md has the figures), and kernels for the architectures left out.
drills: install
	$(BIN)/python -m pytest -m drill

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/basedpyright

# The pages of docs/ and the reference, into build/docs; a dead link ends it.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Ratios on this machine, into benchmarks/results/.
bench: install
	$(BIN)/python benchmarks/run.py

# Everything that needs a GPU, beside the PyTorch that $(PYTHON) has; fetches nothing. GPU_CHECK="--only bench --minutes 30"
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

install: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("autohdr needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.12"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev,docs]"
	rm -f $(VENV)/installed-*
	touch "$@"
