# make demo: the main job.  make test: the tests.  Both set everything up themselves.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src tests benchmarks examples
# a core each; neighbours in a file stay together, so that what they share is trained once
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: setup setup-dev demo test test-old-cpu test-slow lint format types bench docs check clean

setup: .venv/.base
setup-dev: .venv/.dev

# The stamps are written last, so a set-up that was stopped is done again.
.venv/.base: requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'defquant needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv/.dev: .venv/.base requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	touch $@

demo: setup
	$(BIN)/defquant demo --out demo

test: setup-dev
	$(TESTS) -m "not slow"

# With the instructions of a processor without AVX: no result may hang on the last digits. The two variables
# reach torch's kernels alone, of which the files left out use none, or look at no number that comes of them:
# they read files, count, write pages, run statistics in numpy, or hold networks against copies of themselves.
SAME := fuzz $(addprefix test_,$(addsuffix .py,answer data fetch files golden hub imports results))
SAME += $(patsubst tests/%,%,$(wildcard tests/test_paper_*.py tests/test_report*.py))
test-old-cpu: setup-dev
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(TESTS) -m "not slow" $(addprefix --ignore=tests/,$(SAME))

test-slow: setup-dev
	$(TESTS) -m slow --timeout 600

lint: setup-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: setup-dev
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: setup-dev
	$(BIN)/mypy

bench: setup-dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps torchattacks==3.5.1 timm==1.0.31
	for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# pages of the repository's own Markdown, in build/site; strict: a link or an anchor that leads nowhere is an error
docs: setup-dev
	rm -rf build/docs build/site && mkdir -p build/docs
	cp -r *.md LICENSE docs examples results build/docs
	$(BIN)/zensical build --strict --clean

# hypothesis draws the same cases on every machine here; `make test` draws new ones
check: TESTS += --hypothesis-profile=ci
check: lint types docs test test-old-cpu test-slow

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
