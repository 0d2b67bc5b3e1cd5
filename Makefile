# Everything runs in .venv, which scripts/bootstrap.py makes and keeps up to date.
# A GPU build: make demo CMAKE_ARGS=-DGGML_CUDA=ON (remembered by later runs).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= smollm2-135m
PROMPT ?= scripts/demo_prompt.txt
CPP     = native/src/*.cpp native/src/*.h native/chat/*.cpp native/chat/*.h native/cpu/*.cpp native/cpu/*.h native/include/*.h native/server/*.h

.PHONY: help demo build llama-server dev testing test soak check format bench clean

help: ## list the targets
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-13s %s\n", $$1, $$2 }'

demo: build ## build, fetch a small model (98 MB), answer an editing prompt plainly and with drafts
	@$(BIN)/swift-gguf generate $(MODEL) --compare -n 256 --temp 0 -f $(PROMPT)

build: ## .venv with swift-gguf in it; nothing to do takes no time
	@$(PYTHON) scripts/bootstrap.py --venv $(VENV)

llama-server: ## the same with llama.cpp's server, with our drafts inside (minutes more)
	@$(PYTHON) scripts/bootstrap.py --server --venv $(VENV)
	@$(BIN)/swift-gguf config --llama-server

dev: ## the same with the light tools: checks, most tests
	@$(PYTHON) scripts/bootstrap.py --dev --venv $(VENV)

testing: ## the same with all that tests need (torch, LangChain, a browser's driver)
	@$(PYTHON) scripts/bootstrap.py --test --venv $(VENV)

test: testing ## all tests; a part: make test ARGS=tests/unit
	@$(BIN)/pytest $(ARGS)

soak: testing ## what wants hours: damaged files, cells, losslessness, Ctrl-C, the server, sanitizers
	$(BIN)/python scripts/soak_hostile.py --named --count 2000
	$(BIN)/python scripts/soak_cells.py --rounds 2000
	$(BIN)/python scripts/soak_lossless.py --rounds 500
	$(BIN)/python scripts/soak_lossless.py --model smollm2-135m --rounds 40 --requests 12 --longest 24
	$(BIN)/python scripts/soak_signals.py
	$(BIN)/python scripts/soak_server.py $(MODEL)
	scripts/sanitize.sh

check: dev ## lint, types, floors, formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: dev ## format Python and C++
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: build ## what the mechanism costs and gains on this machine
	@$(BIN)/python scripts/lab mechanism $(MODEL) $(ARGS)

clean: ## remove .venv and all that was built; downloads stay in the user's cache
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
