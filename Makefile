# make demo: sparsify, pack, export and run SmolLM2-135M; make test: every check. Both begin from a bare Python 3.10+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The other end of the supported versions: the newest transformers beside the oldest ONNX Runtime, and no extra.
COMPAT := .venv-compat
COMPAT_VERSIONS := transformers==5.24.0 onnxruntime==1.18.0 'numpy<2' 'pyarrow<22'
COMPAT_TESTS := $(patsubst %,tests/test_%.py,packing linear embedding quantizer operator fallback sparsify experts)
NATIVE := $(shell find onnx_ops examples/cpp -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
FORMATTED := $(filter %.cpp %.h,$(NATIVE)) $(wildcard tests/*/*.cpp)

.PHONY: demo test test-compat style benchmark clean

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/pytest -n 2
	$(MAKE) test-compat

test-compat: $(COMPAT)/installed
	$(COMPAT)/bin/pytest -n 2 $(COMPAT_TESTS)

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

benchmark: $(VENV)/installed
	$(BIN)/python benchmarks/kernels.py

# torch first and pinned to the CPU build: unpinned, other packages bring several GB of CUDA libraries.
define INSTALL
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable "$(1)"
endef

# What the tests need takes minutes more; it has all of the demo's.
$(VENV)/installed: pyproject.toml $(NATIVE)
	$(call INSTALL,.[tests])
	touch $(VENV)/demo $@

$(VENV)/demo: pyproject.toml $(NATIVE)
	$(call INSTALL,.[demo])
	touch $@

# From the wheel, not the checkout. What is not imported need not be compiled, which saves a minute.
$(COMPAT)/installed: pyproject.toml $(NATIVE) $(shell find optimum_nm -name '*.py')
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/pip install --quiet --no-compile torch==2.13.0
	$(COMPAT)/bin/pip install --quiet --no-compile . $(COMPAT_VERSIONS) pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(COMPAT) build demo
