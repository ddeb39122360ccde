# The project's commands. Each makes the virtual environment it needs the first time and is quick after that.
#
#   make demo     a real model reads a long text by several attentions: tables, pictures (ARGS="--tokens 4096")
#   make demo-distributed   two processes read one prompt, and one beside them             (ARGS="--tokens 16384")
#   make eval     what the model loses by each method of selection: perplexity and more    (ARGS="all --quick")
#   make train-boundaries   train the network that cuts keys into chunks on a text         (ARGS="--out b.safetensors")
#   make test     the whole test suite                                                     (ARGS="-k hf -x")
#   make test-oldest, test-newest   tests with transformers, oldest and newest releases    (ARGS="-k hf")
#   make test-bounds  both of them, side by side
#   make test-debug   the array tests, in a build with sanitizers and red zones            (ARGS="-k past")
#   make test-threads   calls of several Python threads at a time, in a build with ThreadSanitizer
#   make fuzz     random calls, wrong descriptors and changed files, each for SECONDS      (SECONDS=60 SEED=7)
#   make bench    attention alone, timed next to torch: every goal, pass or miss           (ARGS="--quick")
#   make bench-model   prefill of the demo's model: seconds, peak memory, profile          (ARGS="--quick")
#   make bench-generation   decoding steps, prompts in pieces, a model's memory at 32K
#   make bench-report  what the two measured goes into docs/PERFORMANCE.md, tables and picture
#   make docs     the documentation site, from docs/ and docstrings, into site/; warnings are errors
#   make lint     ruff, clang-format, mypy and pyright, the files of the CI service: checking only
#   make wheels   the wheels of every platform, compiled and checked here                  (ARGS="win_amd64")
#   make release  source distribution and wheels of the tag at hand, and what they must agree with
#   make lab      the notebooks in JupyterLab, in the demo's environment                   (ARGS="--no-browser")
#   make clean    removes environments, builds and caches

PYTHON  ?= python3
VENV    ?= .venv
ARGS    ?=
WORKERS ?= 2
TORCH   ?= torch==2.13.0
PINS    ?=
SECONDS ?= 600
SEED    ?= $(shell date +%s)

PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check --quiet install
CORE := setup.py pyproject.toml $(shell find csrc tests/c -name '*.[ch]' -o -name '*.inc')

DEBUG_HALVES := test-debug-lists test-debug-rest

.PHONY: demo demo-distributed eval train-boundaries test test-oldest test-newest test-bounds test-debug \
    $(DEBUG_HALVES) debug-build test-threads fuzz bench bench-model bench-generation bench-report docs lint wheels \
    release release-check lab clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(PY) -m dhsa demo $(ARGS)

demo-distributed: $(VENV)/.demo
	$(PY) -m dhsa demo-distributed $(ARGS)

eval: $(VENV)/.demo
	$(PY) -m dhsa eval $(ARGS)

train-boundaries: $(VENV)/.demo
	$(PY) -m dhsa train-boundaries $(ARGS)

# Two processes share the files of tests; WORKERS=0 runs them in one, as debuggers need (--pdb). Threads of torch must
# not spin while they wait, or those of one process would take the time of the other.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: $(VENV)/.test
	$(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The demo's packages have all that the benchmarks need. flex_attention compiles itself with g++ or clang++; without
# one its rows say so and the others stand.
bench: $(VENV)/.demo
	$(PY) benchmarks/bench_attention.py $(ARGS)

bench-model: $(VENV)/.demo
	$(PY) benchmarks/bench_model.py $(ARGS)

bench-generation: $(VENV)/.demo
	$(PY) benchmarks/bench_generation.py $(ARGS)

bench-report: $(VENV)/.demo
	$(PY) benchmarks/report.py $(ARGS)

# The tests of the transformers integration on the oldest and the newest releases of what it builds on. test-bounds runs
# the two side by side, once both environments are there: each installation builds the extension of the checkout anew.
HF_TESTS := $(shell grep -l transformers tests/*/test_*.py)
OLDEST   := VENV=.venv-oldest TORCH=torch==2.6.0 PINS='transformers==5.5.0 numpy==1.26.4 safetensors==0.4.3'
NEWEST   := VENV=.venv-newest TORCH='torch<2.15' PINS="--upgrade 'transformers<6' 'numpy<2.6'"
test-oldest:
	$(MAKE) test $(OLDEST) ARGS="$(HF_TESTS) $(ARGS)"
test-newest:
	$(MAKE) test $(NEWEST) ARGS="$(HF_TESTS) $(ARGS)"
test-bounds:
	$(MAKE) .venv-oldest/.test $(OLDEST)
	$(MAKE) .venv-newest/.test $(NEWEST)
	$(MAKE) --jobs=2 --output-sync=target test-oldest test-newest WORKERS=0

# The array tests in a build with sanitizers, in which every part of an arena lies between red zones, and any allocation
# can be made to fail. Memory that Python never gives back is not looked for, nor how much is used. Two halves that take
# the same time run side by side; tiers between the lowest and the highest are left to `make test`. pytest must not
# capture file descriptors, or the reports of the sanitizers would be lost with the process that they end.
DEBUG_ENV = PYTHONPATH=build/debug/lib OMP_NUM_THREADS=1 UBSAN_OPTIONS=print_stacktrace=1 \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)"
test-debug: debug-build
	build/debug/descriptors $(SEED) 10
	$(DEBUG_ENV) $(PY) -P -c 'from dhsa import _core; assert "/build/debug/" in _core.__file__, _core.__file__'
	$(MAKE) --jobs=2 --output-sync=target $(DEBUG_HALVES)

# The extension, and a program that hands wrong descriptors to the same objects.
debug-build: $(VENV)/.test
	DHSA_DEBUG_BUILD=1 DHSA_FAULTS=1 $(PY) setup.py --quiet \
	    build --build-base build/debug --build-lib build/debug/lib
	$(CC) -std=c11 -g1 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wextra -pthread -Icsrc/include \
	    tests/fuzz/descriptors.c $$(find build/debug/temp* -name '*.o' -not -path '*/csrc/python/*') \
	    -o build/debug/descriptors -lm

test-debug-lists: DEBUG_TESTS := both_sides methods select
test-debug-rest: DEBUG_TESTS := arenas attend bad_input compact cuts decode entries faults labels key_index \
    key_index_bytes key_index_histories predictor selection skip wide
$(DEBUG_HALVES): # 5: ARGS chose no test of this half
	$(DEBUG_ENV) $(VENV)/bin/pytest -q --capture=sys -k 'not memory and not avx512' \
	    $(foreach name,$(DEBUG_TESTS),$(wildcard tests/*/test_$(name).py)) $(ARGS) || [ $$? = 5 ]

# Races in the extension; Python and other libraries are not instrumented. The first report ends the process. setarch:
# the sanitizer needs its place among addresses, which some kernels choose at random.
test-threads: $(VENV)/.test
	DHSA_DEBUG_BUILD=threads $(PY) setup.py --quiet build --build-base build/threads --build-lib build/threads/lib
	setarch -R env PYTHONPATH=build/threads/lib OMP_NUM_THREADS=1 TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 \
	    LD_PRELOAD="$$($(CC) -print-file-name=libtsan.so)" \
	    $(VENV)/bin/pytest -q --capture=sys tests/core/test_concurrent.py $(ARGS)

fuzz: export PYTHONPATH = tests:tests/select
fuzz: export OMP_NUM_THREADS = 1
fuzz: debug-build
	build/debug/descriptors $(SEED) $(SECONDS)
	$(PY) -m fuzz.differential --seed $(SEED) --seconds $(SECONDS)
	$(PY) -m fuzz.files --seed $(SEED) --seconds $(SECONDS)

# Pages and docstrings are read without importing the package, so the environment needs neither it nor torch.
docs:
	$(MAKE) VENV=.venv-docs .venv-docs/.docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests/c tests/fuzz -name '*.[ch]' -o -name '*.inc' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(PY) -m mypy
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# `tools/pythons.sh` gets Pythons of other platforms first: one for 64-bit Arm where an emulator is, by default.
wheels:
	$(MAKE) VENV=.venv-release .venv-release/.release
	[ -e build/pythons/manylinux_2_28_aarch64 ] || ! command -v qemu-aarch64 >/dev/null || \
	    ! command -v apt-get >/dev/null || tools/pythons.sh || echo "no Python for 64-bit Arm; going on without it"
	.venv-release/bin/python tools/wheels.py $(ARGS)

# The environment has torch and transformers, too, for the tests of README.md on the wheel.
release:
	$(MAKE) VENV=.venv-release .venv-release/.release .venv-release/.test
	.venv-release/bin/python tools/release.py

release-check:
	$(MAKE) VENV=.venv-release .venv-release/.release
	.venv-release/bin/python tools/release.py --check $(ARGS)

lab: $(VENV)/.lab
	$(PY) -m jupyterlab --ServerApp.root_dir=notebooks $(ARGS)

# A stamp for each set of packages; the extension is built again whenever its sources changed. Python files are used
# from the checkout (an editable install), so that editing them needs no make at all. The build uses the environment's
# own setuptools, so that building again needs no network.
$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
	    sys.exit("dhsa needs Python 3.11 or later, %s is %s" % (sys.executable, sys.version))'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip 'setuptools>=77' wheel
	@touch $@

# torch alone and first, so that the version is this one: the extras would take any.
$(VENV)/.torch: $(VENV)/.python
	@echo "installing $(TORCH) (about 200 MB)"
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(CORE)
	@echo "building the extension, installing dhsa[demo]"
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(CORE)
	@echo "building the extension, installing dhsa[test]"
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable '.[test]' $(PINS)
	@touch $@

$(VENV)/.docs: $(VENV)/.python
	$(PIP) 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1,<2' 'ruff>=0.6'
	@touch $@

$(VENV)/.lab: $(VENV)/.torch $(CORE)
	@echo "building the extension, installing dhsa[lab]"
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable '.[lab]'
	@touch $@

$(VENV)/.lint: $(VENV)/.python pyproject.toml
	$(PIP) --group lint
	@touch $@

$(VENV)/.release: $(VENV)/.python pyproject.toml
	$(PIP) --group release
	@touch $@

clean:
	rm -rf .venv .venv-* build dist site notes.md *.egg-info demo-output eval-output
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f dhsa/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
