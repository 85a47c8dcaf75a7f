# make demo   the main job on a real model, end to end
# make test   build, linters and all tests
# make bench  kernels and encoders, into bench/results
# Everything is installed into .venv; the wheel of llama-cpp-python is kept in the user's cache.
PYTHON ?= python3
VENV   ?= .venv
MODELS ?= models
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

CPP_SOURCES := $(shell find cpp -name "*.cpp" -o -name "*.h")

# What computes with the kernels: run once more at the lowest level of instructions.
KERNEL_TESTS := tests/cpp tests/quants tests/plan/test_calibrated_plans.py tests/evaluate/test_evaluate.py \
	$(addprefix tests/quantize/test_,quantize.py written_bytes.py copied_tensors.py end_to_end.py quantized_sources.py)

# Two files of tests at a time: much of what they do waits for a child or uses one core.
PARALLEL := -n 2 --dist loadfile

.PHONY: all demo test test-neon test-aarch64 test-oldest sanitize lint soak bench clean

all: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt tools/install.sh tools/llama_wheel.sh $(CPP_SOURCES) $(shell find cpp -name "*.def" -o -name "*.in")
	PYTHON=$(PYTHON) VENV=$(VENV) sh tools/install.sh
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	VENV=$(VENV) sh tools/tidy.sh

test: $(STAMP) lint
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term:skip-covered --cov-fail-under=90
	RAMGGUF_ISA=baseline $(BIN)/python -m pytest $(PARALLEL) $(KERNEL_TESTS)
	VENV=$(VENV) sh tools/sanitize.sh

# The extension with ASan and UBSan, under the tests that call it most.
sanitize: $(STAMP)
	VENV=$(VENV) sh tools/sanitize.sh

# The source distribution by itself, with the lowest versions of everything.
test-oldest: $(STAMP)
	VENV=$(VENV) sh tools/oldest.sh

# The NEON kernels in an emulator: needs g++-aarch64-linux-gnu and qemu-user.
test-neon: $(STAMP)
	RAMGGUF_TEST_NEON=1 $(BIN)/python -m pytest tests/cpp/test_neon.py

# The wheel for aarch64, cross-compiled and emulated: needs the same, Debian's apt and dpkg, and the network. Some ten minutes.
test-aarch64: $(STAMP)
	VENV=$(VENV) sh tools/aarch64.sh

# Hours of work for the machine, not for CI: fuzzing, kills, the soak of serve, and whatever else takes long.
soak: $(STAMP)
	VENV=$(VENV) sh tools/fuzz.sh 600
	RAMGGUF_KILLS=60 $(BIN)/python -m pytest tests/core/test_faults.py tests/evaluate/test_faults_engine.py
	RAMGGUF_SERVE_SOAK=1000 $(BIN)/python -m pytest -s tests/deploy/test_serve_soak.py
	RAMGGUF_LM_EVAL=1 $(BIN)/python -m pytest tests/evaluate/test_tasks.py
	$(BIN)/python bench/size.py --folder $(MODELS)

bench: $(STAMP)
	$(BIN)/python tools/real_models.py --out $(MODELS) --only smol768-f16
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/encoders_error.py $(MODELS)/smol768-f16.gguf
	$(BIN)/python bench/encoder_quality.py $(MODELS)/smol768-f16.gguf
	$(BIN)/python bench/quantize.py $(MODELS)/smol768-f16.gguf
	$(BIN)/python bench/threads.py --folder $(MODELS)

demo: $(STAMP)
	$(BIN)/python tools/demo.py --models $(MODELS)

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
