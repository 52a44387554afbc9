# Two commands: make train, make test. Everything is installed into .venv from hashed lock files.
PYTHON ?= python3
PORT ?= 5000
RUN := .venv/bin/python

.PHONY: train check test proofs fuzz lint ui cluster cluster-down lock clean
.DEFAULT_GOAL := train

train: .venv/product  ## train and judge a DIR defense on scikit-learn's digits
	$(RUN) jobs/train.py $(ARGS)

ui: .venv/product  ## open the MLflow UI on what was trained
	$(RUN) -m dircluster.cluster.tracking.owners sqlite:///$(CURDIR)/runs/mlflow.db
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false .venv/bin/mlflow ui \
	  --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

cluster: .venv/dev  ## start S3, MLflow and a Ray cluster on this machine, on loopback
	$(RUN) infra/local_cluster.py up $(ARGS)

cluster-down: .venv/uv  ## end exactly what make cluster started
	$(RUN) infra/local_cluster.py down $(ARGS)

check: .venv/dev lint  ## what a person runs often: lint, types, unit and property tests, on two cores
	$(RUN) -m pytest -n 2 -m "not slow and not long" tests/unit tests/property $(ARGS)

test: .venv/dev lint  ## every test that CI runs; ARGS=--cov counts what they cover
	$(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/fault tests/integration tests/golden tests/unit \
	  tests/property $(ARGS)

proofs: .venv/dev  ## the longer proofs: 20 kills, lost nodes and heads, outages of a minute (80 minutes)
	$(RUN) -m pytest -m slow $(ARGS)

fuzz: .venv/dev  ## 1,000 random command lines and 200 damaged files of each kind: no traceback, no hang (2 minutes)
	$(RUN) -m tests.fuzz $(ARGS)

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	PYTHONPATH=. .venv/bin/lint-imports

.venv/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	touch $@

.venv/product: .venv/uv requirements.lock pyproject.toml
	.venv/bin/uv pip install --quiet --python $(RUN) --require-hashes --compile-bytecode -r requirements.lock
	.venv/bin/uv pip install --quiet --python $(RUN) --no-deps --editable .
	touch $@

.venv/dev: .venv/product tests/requirements.lock
	.venv/bin/uv pip install --quiet --python $(RUN) --require-hashes --compile-bytecode -r tests/requirements.lock
	touch $@

lock: .venv/uv  ## resolve the lock files again
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --no-annotate pyproject.toml -o requirements.lock
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --no-annotate --extra dev --constraint requirements.lock pyproject.toml -o tests/requirements.lock

clean:
	rm -rf .venv
