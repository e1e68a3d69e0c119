# The verbs of Shipyard. Each sets up what it needs.
PYTHON ?= python3
PROFILE ?= quick
ENV ?= prod
BIN := .venv/bin
SHIPYARD := $(BIN)/shipyard
# what mosquitto needs beside what every Debian has
BROKER := libcjson1 libdlt2 libev4 libmosquitto1 libuv1 libwebsockets17 libwrap0
# what Chromium needs beside what every Debian has
BROWSER := chromium-common libasyncns0 libdouble-conversion3 libflac12 libharfbuzz-subset0 libminizip1 libmp3lame0 libmpg123-0
BROWSER += libogg0 libopenh264-7 libopus0 libpulse0 libsndfile1 libvorbis0a libvorbisenc2 libxnvctrl0
export JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION ?= 20

.DEFAULT_GOAL := help
.PHONY: help setup bundle release report compare up down bench synth bench-synth bench-artifacts test lint broker simulate edge-lock
.PHONY: bench-gpu test-gpu bench-edge clean deploy-local rehearse docs browser soak

help: ## list the verbs
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.complete node_modules/.complete ## make .venv from constraints.txt and install the pinned CDK CLI

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Shipyard needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,export,infra,aws,cpu,edge,federate,dev]'
	touch $@

node_modules/.complete: package-lock.json
	npm ci --silent --no-audit --no-fund
	touch $@

release: setup ## the main job: data to signed release and synthesized stacks (PROFILE=quick)
	$(SHIPYARD) release --profile $(PROFILE) $(SIGN)

bundle: setup ## the part of a release that takes long and signs nothing: data to each target's artifact (PROFILE=quick)
	$(SHIPYARD) bundle --profile $(PROFILE)

report: setup ## the figures of a profile as one page, build/PROFILE/report.html (PROFILE=quick)
	$(SHIPYARD) report --profile $(PROFILE)

compare: setup ## LoRA, AdaLoRA and full fine-tuning side by side on validation (PROFILE=quick)
	$(SHIPYARD) compare --profile $(PROFILE)

up: setup ## the fleet of the newest local release on this machine, with a page at http://127.0.0.1:8080/
	$(SHIPYARD) up

down: setup ## end what make up has started
	$(SHIPYARD) down

bench: setup ## the CPU server beside others on one bundle and this machine; run it where nothing else runs
	$(SHIPYARD) bench --profile $(PROFILE)

synth: setup ## synthesize every environment of fleet.toml into cdk.out/ (VALIDATE=1: by the CDK's own validator too)
	$(SHIPYARD) synth $(if $(VALIDATE),--validate)

bench-gpu: setup ## the search graph of a build (PROFILE=quick) on this machine's NVIDIA GPU: its answers, and what a batch costs
	PYTHONPATH=packaging $(BIN)/python tests/bench_gpu.py cases build/$(PROFILE) build/gpu
	test -x build/gpu/env/bin/python || $(PYTHON) -m venv build/gpu/env
	build/gpu/env/bin/python -m pip install --quiet --constraint constraints.txt numpy 'onnxruntime-gpu[cuda,cudnn]==1.31.1'
	PYTHONPATH=packaging build/gpu/env/bin/python tests/bench_gpu.py run build/gpu --json build/gpu/bench.json

bench-synth: setup ## one environment's synth against an empty app's, in turns (ENV=prod)
	$(BIN)/python tests/bench_synth.py $(ENV)

bench-artifacts: setup ## time and memory of each stage, archives and uploads, of the default model and of a BERT of 110 million
	$(BIN)/python -m tests.bench_artifacts

deploy-local: setup ## make a release, then deploy, update, roll back and destroy dev on this machine (PROFILE=quick)
	$(SHIPYARD) deploy-local --profile $(PROFILE)

rehearse: setup ## make a release, then walk it and the next one through all environments and back, with a fault in each step
	$(SHIPYARD) release --profile $(PROFILE) --no-synth
	$(SHIPYARD) rehearse $(if $(FAULTS),--faults $(FAULTS))

docs: setup ## write docs/release.schema.json and the tables of docs/ that are made of code, templates and the release
	$(BIN)/python -c 'from models.release import json_schema; print(json_schema(), end="")' > docs/release.schema.json
	SHIPYARD_UPDATE_DOCS=1 $(BIN)/python -m pytest --quiet tests/test_stacks.py tests/test_security.py tests/test_evaluation_page.py

test: setup lint ## all tests, on a small profile of the real data
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

test-gpu: setup ## training on this machine's GPU, held to the CPU's
	CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest tests/test_device.py

lint: setup ## ruff, mypy, and zizmor over the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/zizmor --quiet --offline --no-progress .github/workflows
	$(BIN)/mypy

broker: ## unpack Debian's mosquitto into build/broker, for the edge's simulation; nothing is installed
	mkdir -p build/broker && cd build/broker && apt-get download mosquitto $(BROKER) && for p in *.deb; do dpkg -x $$p .; done

browser: ## unpack Debian's headless Chromium into build/browser, for the tests of the page; nothing is installed
	mkdir -p build/browser && cd build/browser && apt-get download chromium-headless-shell $(BROWSER) && for p in *.deb; do dpkg -x $$p .; done

SOAK ?= 600
OVERLOAD ?= 60
soak: setup ## overload at three times the capacity, every fault on every target, ten minutes of load (SOAK=, OVERLOAD=seconds)
	$(BIN)/python -m tests.soak --overload $(OVERLOAD) --soak $(SOAK)
	SHIPYARD_FAULTS=all $(BIN)/python -m pytest -q -s tests/test_faults.py

simulate: setup broker ## fifty edge devices on a real broker, and twenty more through ten thousand steps (minutes)
	SHIPYARD_DEVICES=50 SHIPYARD_ROUNDS=6 $(BIN)/python -m pytest -s tests/test_edge_simulation.py
	SHIPYARD_STEPS=10000 $(BIN)/python -m pytest tests/test_edge_sync.py

bench-edge: setup ## the edge in figures: sizes, memory, latency, deltas (half an hour)
	PYTHONPATH=. $(BIN)/python tests/bench_edge.py

edge-lock: setup ## write the lock of the edge's wheels anew, from constraints.txt
	$(BIN)/python -m shipyard.edge.wheels

# --- a release's way: what .github/workflows/release.yml calls, in this order ---
.PHONY: publish upload approve promote rollout status rollback record propose proposal
FROM ?= dev
# who asks for it; of the surroundings, as text and never as a part of a command
export BY ?= $(USER)
SIGN = $(if $(KEY),--key '$(KEY)')
NEWEST = $(basename $(notdir $(shell ls -t build/releases/*.json 2>/dev/null | head -1)))
VERSION = $(or $(RELEASE),$(NEWEST),$(error no release in build/releases: make release, or name one by RELEASE=))

publish: setup ## the newest local release (or RELEASE=version) into releases/
	$(SHIPYARD) publish $(VERSION)
	@echo "release=$(VERSION)" >> $(or $(GITHUB_OUTPUT),/dev/stdout)

upload: setup ## its artifacts into the bucket of ENV
	$(SHIPYARD) upload $(VERSION) --to "s3://$$($(BIN)/python -c \
	  'import sys; from pathlib import Path; from models.config import load_fleet; print(load_fleet(Path("fleet.toml")).bucket(sys.argv[1]))' $(ENV))"

approve: setup ## sign that RELEASE may run in ENV (KEY=file or kms:name of an approver)
	$(SHIPYARD) approve $(VERSION) $(ENV) --by "$$BY" $(SIGN)

promote: setup ## RELEASE from FROM to ENV: copy, record, one line of fleet.toml
	$(SHIPYARD) promote $(FROM) $(ENV) --release $(VERSION) --by "$$BY" $(SIGN)

rollout: setup ## ENV's release to all of its targets; all return where one fails
	$(SHIPYARD) rollout $(ENV) --by "$$BY"

status: setup ## what is live in ENV against its release
	$(SHIPYARD) status $(ENV)

rollback: setup ## ENV to the release before; roll out afterwards
	$(SHIPYARD) rollback $(ENV) --by "$$BY" $(SIGN)

record: ## fleet.toml and releases/ as a pull request by gh (RELEASE=version)
	.ci/pull-request "release/$(VERSION)" "Release $(VERSION): what runs where" fleet.toml releases

propose: setup ## look for reasons to train ENV's models again: drift, and what FRESH=folder holds of new events
	$(SHIPYARD) propose --env $(ENV) $(if $(FRESH),--fresh $(FRESH))

proposal: ## what propose has written, as a pull request by gh
	.ci/pull-request "propose/$(ENV)" "Propose a release for $(ENV)" releases/proposed

.PHONY: setup-sagemaker test-sagemaker
setup-sagemaker: .venv-sagemaker/.complete ## make .venv-sagemaker, which has the SDK that starts training jobs

.venv-sagemaker/.complete: pyproject.toml constraints-sagemaker.txt
	test -x .venv-sagemaker/bin/python || $(PYTHON) -m venv .venv-sagemaker
	.venv-sagemaker/bin/python -m pip install --quiet --constraint constraints-sagemaker.txt --editable '.[sagemaker]'
	touch $@

test-sagemaker: setup setup-sagemaker ## the tests of training jobs, with the SDK
	$(BIN)/python -m pytest tests/test_remote.py

clean: ## remove everything that was built, the environments too
	rm -rf build cdk.out .venv .venv-sagemaker node_modules

.PHONY: cost
USAGE ?= docs/usage.toml
cost: setup ## what cdk.out costs: table, build/cost/report.html and .json (USAGE=docs/usage.toml)
	$(SHIPYARD) cost cdk.out --usage $(USAGE) --html build/cost/report.html --save build/cost/report.json

.PHONY: bench-cost
bench-cost: synth ## how long the report takes, of cdk.out and of a template of 500 resources
	$(BIN)/python tests/bench_cost.py

.PHONY: change change-comment
change: synth cost ## what a change does to cost and templates: build/change/change.md (SINCE=commit, default the last release)
	@mkdir -p build/change
	@.ci/change $(SINCE) > build/change/change.md; code=$$?; cat build/change/change.md; exit $$code

change-comment: ## write build/change/change.md on a pull request by gh, in place of the last one (PULL_REQUEST=number)
	head -c 60000 build/change/change.md | gh pr comment $(PULL_REQUEST) --edit-last --create-if-none --body-file -
