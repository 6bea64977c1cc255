# `make demo` and `make test` each do all of their own set-up in a virtual environment of their own.
PYTHON ?= python3
DEMO := .venv/demo
TEST := .venv/test
GPU := .venv/gpu
SYSTEM ?=
GPU_EXTRAS ?= gpu,tensorrt
# torch's plain name brings gigabytes of CUDA packages on x86; this version has a CPU build on its own index too.
TORCH ?= torch==2.13.0

.PHONY: demo test test-gpu lint types architecture ci bench-report clean

demo: $(DEMO)/ready
	@$(DEMO)/bin/paliedge export benchmarks/shapes/checkpoint -o build/shapes --no-compare
	@$(DEMO)/bin/paliedge demo -m build/shapes --save demo_output

test: $(TEST)/ready
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest  # two threads wait for one another where a neighbour takes a core

# Needs an NVIDIA GPU. SYSTEM=--system-site-packages lets the environment see JetPack's TensorRT;
# GPU_EXTRAS=cpu,tensorrt is for Python 3.10, which has no onnxruntime-gpu; GPU_EXTRAS=gpu,rtx for desktops.
test-gpu: $(GPU)/ready
	$(GPU)/bin/python -m pytest tests/gpu

lint: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .

types: $(TEST)/ready
	$(TEST)/bin/mypy

architecture: $(TEST)/ready
	$(TEST)/bin/lint-imports

ci: lint types architecture test

# The README's tables and pictures, from benchmarks/results/*.json.
bench-report: $(TEST)/ready
	$(TEST)/bin/python -m benchmarks.precision_table
	$(TEST)/bin/python -m benchmarks.bench_report

$(DEMO)/ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[cpu,export]"
	touch $@

$(TEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(TEST)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[cpu,export,reference,bench,eval,optimum,polygons,video,rtx,dev]"
	touch $@

$(GPU)/ready: pyproject.toml
	$(PYTHON) -m venv $(SYSTEM) $(GPU)
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$(GPU_EXTRAS),export,reference,bench,eval,optimum,polygons,dev]"
	touch $@

clean:
	rm -rf .venv build dist demo_output
