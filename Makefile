# Two commands do everything: `make search` and `make test`. Both set up .venv first, on any machine with Python 3.11.
PYTHON ?= python3.11
CONFIG ?= configs/digits.yaml
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: search test test-all chromium check coverage versions chaos fuzz adversarial zoo peers bench constraints clean

search: $(INSTALLED)
	$(BIN)/slimfront search $(CONFIG)

test: $(INSTALLED) chromium
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# With the tests that take long.
test-all: $(INSTALLED) chromium
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m ""

# The tests in a browser are skipped where there is no Chromium and it cannot be installed without asking for a password.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  echo "Installing Chromium for the tests in a browser …"; \
	  apt="$$([ "$$(id -u)" = 0 ] || echo sudo -n) env DEBIAN_FRONTEND=noninteractive apt-get"; \
	  { $$apt install -y -q chromium || { $$apt update -q && $$apt install -y -q chromium; }; } >/dev/null 2>&1; } || \
	  echo "Chromium could not be installed: the tests in a browser are skipped"

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Which lines the tests run, also those in processes of their own; the files with the fewest first.
coverage: $(INSTALLED) chromium
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/coverage report --sort=cover

# The fast tests with other versions of Python, torch, Ray and MLflow, each in an environment that is made for it.
versions: $(INSTALLED)
	$(BIN)/python -m benchmarks versions

# A search killed twenty times.
chaos: $(INSTALLED)
	$(BIN)/python -m benchmarks chaos

# Ten thousand broken configs.
fuzz: $(INSTALLED)
	$(BIN)/python -m benchmarks fuzz

# Ten thousand networks that are drawn to mislead compaction.
adversarial: $(INSTALLED)
	$(BIN)/python -m benchmarks adversarial

# Networks of torchvision, timm, transformers and segmentation-models-pytorch, in an environment that has them.
zoo: .venv-zoo/.installed
	rm -f runs/zoo.jsonl
	.venv-zoo/bin/python -m benchmarks zoo

# What benchmarks/width.py and benchmarks/search_quality.py run beside ours, each in an environment of its own.
peers: .venv-oto/.installed .venv-modelopt/.installed .venv-syne/.installed

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# Remade when what is installed changes. The stamp comes last, so that a broken install is tried again.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "slimfront needs Python 3.11; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# torchvision can be imported beside the torch that it was made for, not beside the one of constraints.txt.
.venv-zoo/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "slimfront needs Python 3.11; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv-zoo
	grep -v '^torch==' constraints.txt > .venv-zoo/constraints.txt
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-zoo/constraints.txt -e '.[onnx]' \
	  torch==2.14.1 torchvision==0.29.1 timm transformers segmentation-models-pytorch
	@touch $@

.venv-oto/.installed: constraints.txt
	$(PYTHON) -m venv .venv-oto
	.venv-oto/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" \
	  only-train-once==3.0.1 numpy packaging onnxscript
	@touch $@

.venv-syne/.installed: constraints.txt
	$(PYTHON) -m venv .venv-syne
	.venv-syne/bin/python -m pip install --quiet syne-tune==0.16.0
	@touch $@

.venv-modelopt/.installed: constraints.txt
	$(PYTHON) -m venv .venv-modelopt
	.venv-modelopt/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" nvidia-modelopt==0.47.0 \
	  numpy requests huggingface_hub tqdm rich pydantic omegaconf pulp safetensors regex datasets transformers scipy
	.venv-modelopt/bin/python -m pip install --quiet --no-deps torchprofile==0.0.4
	@touch $@

# The versions of a fresh install of pyproject.toml's ranges, without local build tags such as +cpu.
constraints:
	rm -rf .venv-fresh && $(PYTHON) -m venv .venv-fresh
	.venv-fresh/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" && .venv-fresh/bin/python -m pip install --quiet -e '.[dev]'
	{ echo "# What everything is tested with; the Makefile installs with it. Remade by: make constraints"; \
	  .venv-fresh/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt
	rm -rf .venv-fresh

clean:
	rm -rf .venv .venv-* *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
