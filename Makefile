# make build   the server, with ONNX Runtime's library beside it
# make run     serve the example registry
# make test    everything a contributor needs: format, lints, unit, integration and client tests
# make check-cuda   type-check the build with candle on GPUs, without CUDA
# make models  train the example models again (large Python packages)
# make bench   the server against what engine and transport could do; QUICK=1, FRESH=1: see docs/performance.md
# make bench-peers   the same models beside other servers, fetched from PyPI
# make bench-micro   parts of the request path (criterion)
# make instructions  instructions a request against benches/instructions.txt (valgrind)
# make conformance   the ONNX project's node tests through the server, on both engines, and what it takes to hold them

# Of the ONNX Runtime that tests load in Python.
export ORT_DISABLE_TELEMETRY = 1

PYTHON ?= python3
CARGO ?= cargo
BIN := target/release/tidegate
CLIENTS := target/clients-venv
BENCHES := target/bench-venv

.PHONY: build run test lint unit clients conformance check-cuda models bench bench-peers bench-micro instructions bless clean

build: target/release/.onnxruntime
	$(CARGO) build --release --locked

# Without the library everything works on the embedded engine, more slowly; say so and go on.
target/release/.onnxruntime: scripts/fetch-onnxruntime.sh scripts/onnxruntime.txt
	@mkdir -p target/release
	@if PYTHON=$(PYTHON) sh scripts/fetch-onnxruntime.sh target/release; then touch $@; \
	else echo "make: ONNX Runtime's library could not be had: models will run on tract"; fi

run: build
	$(BIN) serve --registry models

test: lint unit clients

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --release --locked --all-targets -- --deny warnings
	$(CARGO) clippy --release --locked --no-default-features -- --deny warnings

# Builds the binary too, with what the tests need: a separate build would compile half of the dependencies twice.
unit: target/release/.onnxruntime
	@if [ -e target/release/.onnxruntime ]; then \
		$(CARGO) test --release --locked; \
	else \
		TIDEGATE_TEST_WITHOUT_ONNXRUNTIME=1 $(CARGO) test --release --locked; \
	fi

$(CLIENTS)/.installed: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

clients: unit $(CLIENTS)/.installed
	$(CLIENTS)/bin/python -B -m pytest -q -p no:cacheprovider tests/clients

# `make clients` asks the same questions on one engine; this measures, too.
conformance: build $(CLIENTS)/.installed
	$(CLIENTS)/bin/python -B tests/clients/conformance.py --engine onnxruntime
	$(CLIENTS)/bin/python -B tests/clients/conformance.py --engine tract

# Not a part of `make test`: it compiles candle-core once more. CUDA's own compiler is played by a script, for the
# versions and the architecture named here; nothing is compiled for a GPU.
check-cuda:
	NVCC=$(CURDIR)/scripts/fake-nvcc CUDA_HOME=$(CURDIR)/target CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000 \
		$(CARGO) clippy --release --locked --all-targets --features cuda -- --deny warnings

target/models-venv/.installed: models/requirements.txt
	$(PYTHON) -m venv target/models-venv
	target/models-venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

models: target/models-venv/.installed
	target/models-venv/bin/python models/train.py

$(BENCHES)/.installed: benches/requirements.txt
	$(PYTHON) -m venv $(BENCHES)
	$(BENCHES)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

bench: build $(BENCHES)/.installed
	$(BENCHES)/bin/python -B benches/matrix.py

bench-peers: build $(BENCHES)/.installed
	$(BENCHES)/bin/python -B benches/peers.py

bench-micro:
	$(CARGO) bench --locked

# Skips itself, and says so, where valgrind is not installed. BLESS=1 writes down what it finds.
instructions:
	$(CARGO) bench --locked -- instructions

# Rewrite the generated references in docs/.
bless:
	TIDEGATE_BLESS=1 $(CARGO) test --release --locked reference

clean:
	$(CARGO) clean
