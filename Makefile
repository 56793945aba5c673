# `make demo` and `make test` do all set-up themselves; see docs/installation.md. PYTHON=... names the interpreter.
ifeq ($(origin PYTHON), undefined)
# A name on PATH is no proof: version managers put shims there for interpreters that are not installed.
PYTHON := $(shell for name in python3.12 python3.13 python3.11 python3; do \
	$$name tools/setup_env.py --check >/dev/null 2>&1 && { echo $$name; exit; }; done; echo python3)
endif

RUN := .venv/bin/python
# Two test processes with one thread each are faster on two cores than one process with two threads.
TEST := -m pytest -n 2 --dist worksteal --durations=40

.PHONY: demo demo-pretrain demo-seg demo-cls test test-slow test-mmcv test-onedl docs lint setup setup-mmcv setup-onedl python clean

demo: demo-pretrain
	$(RUN) tools/train.py configs/demo/cascade_rcnn_revcol_nano_digits.py --work-dir work_dirs/demo \
		--cfg-options "load_from=$$(cat work_dirs/demo-pretrain/last_checkpoint)"
	$(RUN) tools/test.py configs/demo/cascade_rcnn_revcol_nano_digits.py "$$(cat work_dirs/demo/last_checkpoint)" \
		--work-dir work_dirs/demo --show-dir work_dirs/demo/pictures

demo-seg: demo-pretrain
	$(RUN) tools/train.py configs/demo/upernet_revcol_nano_digits.py --work-dir work_dirs/demo-seg \
		--cfg-options "load_from=$$(cat work_dirs/demo-pretrain/last_checkpoint)"
	$(RUN) tools/test.py configs/demo/upernet_revcol_nano_digits.py "$$(cat work_dirs/demo-seg/last_checkpoint)" \
		--work-dir work_dirs/demo-seg --show-dir work_dirs/demo-seg/pictures

# What the detector and the segmentor of the demos start from.
demo-pretrain: setup
	$(RUN) tools/make_digits.py data/digits
	$(RUN) tools/train.py configs/demo/revcol_nano_digits_pretrain.py --work-dir work_dirs/demo-pretrain

demo-cls: setup
	$(RUN) tools/make_digits.py data/digits
	$(RUN) tools/train.py configs/demo/revcol_nano_digits_cls.py --work-dir work_dirs/demo-cls
	$(RUN) tools/test.py configs/demo/revcol_nano_digits_cls.py "$$(cat work_dirs/demo-cls/last_checkpoint)" --work-dir work_dirs/demo-cls

test: setup
	OMP_NUM_THREADS=1 $(RUN) $(TEST) -m 'not slow'

# Those which `make test` leaves out.
test-slow: setup
	OMP_NUM_THREADS=1 $(RUN) $(TEST) -m slow

# The same tests with mmcv's own operators, which are built for it: a C++ compiler, and some 10 minutes once per machine.
test-mmcv: setup-mmcv
	OMP_NUM_THREADS=1 .venv-mmcv/bin/python $(TEST) -m 'not slow'

# The same tests with the maintained forks in place of OpenMMLab's packages.
test-onedl: setup-onedl
	OMP_NUM_THREADS=1 .venv-onedl/bin/python $(TEST) -m 'not slow'

# The documentation as a site, in site/.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

lint: setup
	$(RUN) -m ruff check
	$(RUN) -m codespell_lib

setup: python
	@$(PYTHON) tools/setup_env.py

setup-mmcv: python
	@$(PYTHON) tools/setup_env.py --venv .venv-mmcv --requirements requirements/mmcv.txt --build mmcv==2.1.0

setup-onedl: python
	@$(PYTHON) tools/setup_env.py --venv .venv-onedl --requirements requirements/onedl.txt

# The set-up script itself needs Python 3.6 to start; it refuses versions that are too old for the package.
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 6))' >/dev/null 2>&1 || \
		{ echo "error: PYTHON=$(PYTHON) does not run, or is too old; name a Python 3.11, 3.12 or 3.13" >&2; exit 1; }

clean:
	rm -rf .venv .venv-mmcv .venv-onedl .cache build site *.egg-info revcol_mm/.mim
