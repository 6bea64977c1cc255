# Each target does all of its own set-up. An environment is one lock of locks/, installed by its hashes, and the project
# as it lies here. torch is in no lock: its CPU builds have other hashes on every machine, and the plain name brings
# gigabytes of CUDA packages on x86. TORCH=path/to/torch-cpu.whl names another build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TEST := .venv/test
GPU := .venv/gpu
SYSTEM ?=
GPU_EXTRAS ?= gpu,tensorrt
INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-system test-aarch64 test-processors test-python3.13 debian test-latest test-oldest soak test-gpu lint types \
	architecture lock bench-report clean

demo: .venv/export/ready
	@.venv/export/bin/paliedge export benchmarks/shapes/checkpoint -o build/shapes --no-compare
	@.venv/export/bin/paliedge demo -m build/shapes --save demo_output

test: $(TEST)/ready
	$(TEST)/bin/python -m pytest

# What needs Debian's packages and gets them by apt: other processors and other Pythons, emulated or in a root of their own.
test-system: test-aarch64 test-processors test-python3.13

# An arm64 root under qemu; AARCH64=0 leaves it out.
AARCH64 ?= 1
ifeq ($(AARCH64),0)
test-aarch64:
	@echo "aarch64 was not tested: AARCH64=0"
else
test-aarch64: $(TEST)/ready debian
	$(TEST)/bin/python -m pytest tests/system/test_aarch64.py
endif

# x86 without VNNI and without AVX, under qemu.
test-processors: $(TEST)/ready debian
	$(TEST)/bin/python -m pytest tests/system/test_processors.py

# What needs no torch, in Debian 13's root.
test-python3.13: $(TEST)/ready debian
	$(TEST)/bin/python -m pytest tests/system/test_python313.py

DEBIAN := debootstrap qemu-user-static
debian:
	@dpkg -s $(DEBIAN) >/dev/null 2>&1 || { echo "installing Debian's $(DEBIAN) by apt"; \
		{ apt-get -qq update && apt-get -qq install -y --no-install-recommends $(DEBIAN); } >/dev/null; } \
		|| { echo "needed: apt-get install $(DEBIAN), as root"; exit 1; }

# The newest versions that pyproject.toml allows, whatever day it is. What packages announce to drop is listed; it is an
# error where the project itself uses it.
test-latest: .venv/latest/ready
	.venv/latest/bin/python -m pytest --announced

# The oldest versions that pyproject.toml allows, and the newest that Python 3.10 gets, both on the Python at hand.
test-oldest: .venv/oldest/ready .venv/python3.10/ready
	.venv/oldest/bin/python -m pytest --announced
	.venv/python3.10/bin/python -m pytest --announced

# Checkpoints in 2,000 random forms, of which `make test` has 30. Takes an hour.
soak: $(TEST)/ready
	PALIEDGE_NUM_FORMS=2000 $(TEST)/bin/python -m pytest -q tests/export/test_random_forms.py

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

# The newest versions that pyproject.toml allows, written down for every supported Python and processor.
lock: .venv/uv/lock.txt
	.venv/uv/bin/python locks/lock.py --upgrade

# The tables and pictures of docs/precision.md and docs/performance.md, from benchmarks/results/*.json.
bench-report: $(TEST)/ready
	$(TEST)/bin/python -m benchmarks.precision_table
	$(TEST)/bin/python -m benchmarks.bench_report

.PRECIOUS: .venv/%/lock.txt
.venv/%/ready: .venv/%/lock.txt pyproject.toml
	.venv/$*/bin/python $(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

.venv/%/lock.txt: locks/%.txt locks/build.txt
	$(PYTHON) -m venv --clear .venv/$*
	.venv/$*/bin/python $(INSTALL) --no-deps --require-hashes -r locks/build.txt
	.venv/$*/bin/python $(INSTALL) --no-deps --require-hashes -r $<
	if grep -q '^transformers==' $<; then .venv/$*/bin/python $(INSTALL) "$(TORCH)"; fi
	cp $< $@

.PHONY: locks/latest.txt
locks/latest.txt: .venv/uv/lock.txt
	.venv/uv/bin/python locks/lock.py --latest $@

$(GPU)/ready: pyproject.toml
	$(PYTHON) -m venv $(SYSTEM) $(GPU)
	$(GPU)/bin/python $(INSTALL) "$(TORCH)"
	$(GPU)/bin/python $(INSTALL) -e ".[$(GPU_EXTRAS),export,reference,bench,eval,optimum,polygons,dev]"
	touch $@

clean:
	rm -rf .venv build dist demo_output

# Tests run on one thread: two wait for one another where a neighbour takes a core.
test test-aarch64 test-processors test-python3.13 test-latest test-oldest soak: export OMP_NUM_THREADS := 1
