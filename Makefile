# `make` sets up, runs the whole pipeline and shows the results; `make help` lists the targets.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
SEARCH ?= latent_kl
COHORTS ?=
TRIALS ?=
WORKERS ?=
PROCESSES ?= 1
TESTERS ?= 2
TIMES ?= 20
PORT ?= 5000
DASHBOARD_PORT ?= 8080
UI = http://127.0.0.1:$(PORT)/\#/experiments/1/runs

ifneq ($(findstring :,$(CURDIR)),)
$(error the folder $(CURDIR) has a colon in its path, which PATH cannot hold; rename it)
endif
# DVC's stages call `python`: it must be the environment's. Programs are run as its modules, because
# a script names the folder in which it was installed.
export PATH := $(or $(realpath .venv),$(CURDIR)/.venv)/bin:$(PATH)
# A container with `--user N` has neither a user name nor a home, and DVC needs both.
export USER ?= user-$(shell id -u)
export LOGNAME ?= $(USER)
export HOME ?= /tmp
export PYTHONDONTWRITEBYTECODE = 1
export MLFLOW_DISABLE_TELEMETRY = true
# The stage reads the number of processes of a search here, because DVC's command line is fixed.
# Empty: one per core.
export GEM_WORKERS = $(WORKERS)
# And the number of processes that train one model.
export GEM_PROCESSES = $(PROCESSES)

.PHONY: all help environment check repro results test test-fast faults lint format benchmark \
	benchmark-cohorts realism train tune dashboard promote ui clean lock
.DEFAULT_GOAL := all

all: repro results  ## set up, run every stage that is out of date, show the results

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 19
	@echo "variables: SEARCH=$(SEARCH) TRIALS=$(TRIALS) WORKERS=$(WORKERS) PROCESSES=$(PROCESSES) TESTERS=$(TESTERS)" \
		"TIMES=$(TIMES)" "COHORTS=$(COHORTS)" \
		"PORT=$(PORT) TORCH=$(TORCH) PIP_ARGS=$(PIP_ARGS)"

environment: .venv/installed  ## create .venv: torch on its own line, everything else pinned with hashes

.venv/installed: requirements.lock
	@echo "Installing into .venv: torch, then requirements.lock (a minute or two)"
	@case "$$PWD" in *%*) echo "error: $$PWD: MLflow cannot be installed in a folder with % in its" \
		"name; rename it, or make .venv a link to an environment elsewhere" >&2; exit 2;; esac
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "error: $(PYTHON) is not Python 3.11 or later; make PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -m venv .venv
	@python -m pip install -qq $(PIP_ARGS) "$(TORCH)"
	@python -m pip install -qq --require-hashes -r requirements.lock
	@python -m pip check
	@touch $@

# The independent judge of the tests needs other versions of almost everything.
.venv-cell-eval/installed: tests/cell_eval/requirements.lock
	@echo "Installing into .venv-cell-eval: what the tests compare with (a minute)"
	@"$(PYTHON)" -m venv .venv-cell-eval
	@.venv-cell-eval/bin/python -m pip install -qq $(PIP_ARGS) --no-compile --require-hashes --no-deps \
		-r tests/cell_eval/requirements.lock
	@touch $@

check: environment  ## check params.yaml and the searches, before any data is read
	@python -m pipeline.configure

repro: check  ## run every stage that is out of date
	@python -m dvc repro

results: check  ## the table of the last evaluation
	@python -m pipeline.results
	@echo
	@echo "Compare the runs in the browser:  make ui   (then open http://127.0.0.1:$(PORT))"

test: environment .venv-cell-eval/installed  ## all tests, in TESTERS processes
	python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

test-fast: environment  ## unit tests only; one file: .venv/bin/python -m pytest tests/model/test_network.py
	python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder -m "not integration and not slow"

faults: environment  ## the tests of faults and attacks, each fault TIMES times, with figures
	python -m pytest tests/faults -n $(TESTERS) --dist loadfile --times $(TIMES)

lint: environment  ## check style and format of the code
	python -m ruff check .
	python -m ruff format --check .

format: environment  ## format the code
	python -m ruff check --fix .
	python -m ruff format .

benchmark: environment  ## speed of training, prediction and reading, and their memory (some minutes)
	python -m benchmarks.training
	python -m benchmarks.prediction
	python -m benchmarks.reading

benchmark-cohorts: environment  ## GEM and simple predictors on real cohorts: make benchmark-cohorts COHORTS=folder
	@[ -n "$(COHORTS)" ] || { echo "error: COHORTS is not set; make benchmark-cohorts" \
		"COHORTS=folder, with .h5ad files (docs/real_cohorts.md)" >&2; exit 2; }
	python -m benchmarks.cohorts "$(COHORTS)"

realism: environment  ## compare the simulated cohort with real ones: statistics and a figure
	python -m benchmarks.realism

train: check  ## train: make train PROCESSES=2 (one model by two processes; on GPUs one process a GPU)
	@python -m dvc repro train

tune: check  ## search: make tune SEARCH=latent_kl TRIALS=40 WORKERS=2 (continues to that many trials)
ifneq ($(TRIALS),)
	@python -m pipeline.configure --budget "$(SEARCH)=$(TRIALS)"
endif
ifeq ($(SEARCH),latent_kl)
	@python -m dvc repro tune
else
	@python -m dvc repro prepare
	@python -m pipeline.tune --search "$(SEARCH)"
endif

# The servers below know neither ~ nor the driver. They read an address from the environment: their
# arguments, and so a password in them, are visible to everybody on the machine.
NORMALISE = case "$$address" in \
	postgres://*|postgresql://*) address="postgresql+psycopg:$${address\#*:}";; \
	"sqlite:///~/"*) address="sqlite:///$$HOME/$${address\#sqlite:///\~/}";; esac
RUN_DASHBOARD = import os, sys; from optuna_dashboard._cli import main; \
	sys.argv.append(os.environ["OPTUNA_STORAGE"]); main()

dashboard: check  ## open Optuna's dashboard of all searches on 127.0.0.1
	@[ -n "$$OPTUNA_STORAGE" ] || [ -e .gem/optuna.db ] || { \
		echo "error: .gem/optuna.db: no search has run here; make tune" >&2; exit 2; }
	@address="$${OPTUNA_STORAGE:-sqlite:///.gem/optuna.db}"; $(NORMALISE); \
	OPTUNA_STORAGE="$$address" python -c '$(RUN_DASHBOARD)' --host 127.0.0.1 --port $(DASHBOARD_PORT)

promote: check  ## write the winner of SEARCH into params.yaml and show the difference
	python -m pipeline.configure --promote "$(SEARCH)"

ui: environment  ## open MLflow on 127.0.0.1
	@address="$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"; \
	case "$$address" in http://*|https://*) host="$${address#*://}"; \
		echo "MLFLOW_TRACKING_URI is a server; open it there: $${address%%://*}://$${host##*@}"; \
		exit 0;; esac; \
	echo "all models, best first on unseen combinations:" \
		"$(UI)?orderByKey=metrics.%60test_combination%2Fskill%60&orderByAsc=false"; \
	echo "curves and charts of the search:" \
		"$(UI)?compareRunsMode=CHART&searchFilter=tags.stage%20%3D%20'tune'&orderByKey=metrics.%60best%2Fpredictive_log_likelihood%60&orderByAsc=false"; \
	$(NORMALISE); \
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_BACKEND_STORE_URI="$$address" \
		python -m mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1

lock: environment  ## rewrite both lock files: of the project, and of the judge that the tests compare with
	python -m pip install --quiet $(PIP_ARGS) uv
	python -m uv pip compile pyproject.toml --extra test --generate-hashes --no-emit-package torch \
		--no-header --no-annotate --quiet --output-file requirements.lock $(PIP_ARGS)
	python -m uv pip compile tests/cell_eval/requirements.in --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --quiet --output-file tests/cell_eval/requirements.lock $(PIP_ARGS)

clean:  ## delete what the stages wrote, and the local tracking; keeps .venv and what is committed
	rm -rf data/synthetic data/cohort experiments/*/model.safetensors experiments/*/seeds \
		experiments/*/figures experiments/registered.json mlflow.db mlruns .gem
