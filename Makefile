# `make demo` and `make test` each do all their own set-up.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo laptop yardstick test test-all fuzz lint bench clean

demo: .venv/.installed
	$(PY) -m golf.prepare builtin
	$(PY) train_gpt.py smoke

laptop: .venv/.installed
	$(PY) -m golf.prepare english --vocab-size 4096
	$(PY) train_gpt.py laptop --run.data data/english

# Development only: real text from the folder that YARDSTICK_DATA names.
YARDSTICK_TRAIN := openwebtext_val wikipedia_passages genres_nltk english_novels
YARDSTICK_FILES = $(YARDSTICK_TRAIN:%=$(YARDSTICK_DATA)/%.jsonl.zst) --cut 8000
YARDSTICK_TOKENIZER = --tokenizer $(YARDSTICK_DATA)/tokenizers/fineweb_$(1)_bpe.model.zst
YARDSTICK_VALIDATION = --validation $(YARDSTICK_DATA)/$(1).jsonl.zst
# Web text first: how often each of the four is trained on by the `laptop` recipe.
YARDSTICK_TIMES = --times 6,2,0.2,0.03
yardstick: .venv/.installed
ifneq ($(wildcard $(YARDSTICK_DATA)/fineweb_val_prefix.jsonl.zst),)
	$(PY) -m golf.prepare files $(YARDSTICK_FILES) $(call YARDSTICK_TOKENIZER,1024) \
		$(call YARDSTICK_VALIDATION,fineweb_val_prefix) --name yardstick
	$(PY) -m golf.prepare files $(YARDSTICK_FILES) $(call YARDSTICK_TOKENIZER,4096) $(YARDSTICK_TIMES) \
		$(call YARDSTICK_VALIDATION,fineweb_val_prefix) --name yardstick4096
	$(PY) -m golf.prepare files $(YARDSTICK_FILES) $(call YARDSTICK_TOKENIZER,1024) \
		$(call YARDSTICK_VALIDATION,fineweb_docs_sample) --hold-out --name development
	$(PY) -m golf.prepare files $(YARDSTICK_FILES) $(call YARDSTICK_TOKENIZER,4096) $(YARDSTICK_TIMES) \
		$(call YARDSTICK_VALIDATION,fineweb_docs_sample) --name development4096
else
	@echo "YARDSTICK_DATA names no folder with the yardstick's text; nothing to do."
endif

test: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

fuzz: .venv/.installed
	$(PY) -m pip install --quiet atheris
	$(PY) fuzz/run.py all 60

bench: .venv/.installed
	$(PY) bench/train_speed.py
	$(PY) bench/step_speed.py
	$(PY) bench/step_profile.py
	$(PY) bench/scaling.py
	$(PY) bench/prepare_speed.py
	$(PY) bench/start_speed.py

.venv/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv data/builtin data/english
