"""Hold the programs that run as `python -m scripts.NAME`, each a file or a folder. No other code imports them."""
