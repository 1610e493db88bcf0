# `make demo` shows the main job on whatever is here; `make test` runs everything that needs no GPU.
# Both set up .venv themselves; PYTHON=... names another python than python3 for it.
PYTHON ?=
export PYTHON
python := .venv/bin/python

# Threads that wait by spinning take the cores from those that work wherever other programs run too: 30 times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint build catalogue docs clean

demo: .venv/ready
	$(python) -m moe_runtime.demo

test: .venv/ready
	$(python) -m pytest -m "not gpu and not slow and not compile"
	$(python) -m pytest -m "compile and not gpu and not slow"

lint: .venv/ready
	$(python) -m ruff check .
	$(python) -m mypy

# The kernels' library for the GPUs here, or for MOE_RUNTIME_CUDA_ARCHS.
build: .venv/ready
	$(python) -m codegen build

catalogue: .venv/ready
	$(python) -m codegen emit

# The site in out/site.
docs: .venv/ready
	$(python) -m mkdocs build --strict

clean:
	rm -rf out build dist generated/sm_* generated/manifest.json .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml .ci/setup
	.ci/setup
	touch $@
