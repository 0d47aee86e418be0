# make            a virtual environment in .venv with the pinned requirements and this package
# make demo       install, then the demonstration
# make test       install, lint, then every test but the long matrix and the GPU ones
# make test-full  install, lint, then every test but the GPU ones
# make test-oldest  the core of the tests on the oldest torch and transformers, in .venv-oldest; some gigabytes
# make gpu-check  what can be found out on a GPU in ten minutes
# make lint       ruff and mypy through pre-commit; make format mends what ruff can mend
# make clean      remove what the above made

BIN := .venv/bin
STAMP := .venv/.installed
# python3.11 by preference; asked to run, not only looked up, since a version manager's stub may stand in its place.
PYTHON ?= $(or $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null),python3)

.PHONY: install demo test test-full test-oldest gpu-check lint format clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): requirements/base.txt requirements/dev.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements/dev.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	$(BIN)/fapool demo

test: lint
	$(BIN)/python -m pytest -m "not full and not gpu"

test-full: lint
	$(BIN)/python -m pytest -m "not gpu"

# Without what differs there: Gemma 2 is refused as it is loaded by default, and docs/gpu.md says the rest.
OLDEST := kernels devices plan wire base pool store integrations/huggingface
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest $(addprefix tests/,$(OLDEST)) -m "not full and not gpu" -k "not gemma2" @tests/oldest.args

.venv-oldest/.installed: requirements/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -r requirements/oldest.txt
	@touch $@

# By a Python whose torch sees the GPU: what make installs is a CPU build.
gpu-check:
	$(PYTHON) -m tests.gpu.check

# pre-commit needs a git checkout; an unpacked archive gets the same three checks without it.
lint: install
	@if [ -e .git ] && git rev-parse --git-dir >/dev/null 2>&1; then \
		PRE_COMMIT_HOME="$(CURDIR)/.cache/pre-commit" $(BIN)/pre-commit run --all-files; \
	else \
		echo "not a git checkout: pre-commit is skipped, its checks run directly"; \
		$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy; \
	fi

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
