"""Programs run as `python -m scripts.NAME`: training, benchmarks, sweeps and inspection. Nothing imports them."""
