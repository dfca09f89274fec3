.PHONY: demo test lint benchmark ci

demo:
	python generate.py

test:
	python -m pytest

lint:
	ruff check .

benchmark:
	python -m scripts.benchmark --against transformers,llama.cpp

ci:
	bash .ci/run
