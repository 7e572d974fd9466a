# make demo: sparsify, pack, export and run SmolLM2-135M; make test: every check. Both begin from a bare Python 3.10+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find onnx_ops -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: demo test style benchmark clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h,$(NATIVE))
	$(BIN)/pytest -n 2

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h,$(NATIVE))

benchmark: $(VENV)/installed
	$(BIN)/python benchmarks/kernels.py

# torch first and pinned to the CPU build: unpinned, other packages bring several GB of CUDA libraries.
$(VENV)/installed: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[tests]"
	touch $@

clean:
	rm -rf $(VENV) build demo
