"""What an engine loads of ours: what it lacks for this architecture, and how it speaks to the world.

`register.py` is vLLM's entry point, `sglang.py` has SGLang's. `model.py`, `experts.py`, `widened.py` and `widening.py`
are for vLLM's model and kernels, `middleware.py` for its API server, `log_format.py` and `logging.json` for its log.
Importing the package imports none of them.
"""
