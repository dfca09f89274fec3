.PHONY: demo test lint ci

demo:
	python generate.py

test:
	python -m pytest

lint:
	ruff check .
	ruff format --check .

ci:
	bash .ci/run
