"""Measurements: what comes in is a checkpoint and a device, what goes out is a table and a JSON document.

`python -m perf decode` is the first of them: see `decode.py` for how it measures and `engines.py` for what.
"""
