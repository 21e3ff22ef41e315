"""Checkpoint in, checkpoint out: each command reads or writes a directory in the model family's Hugging Face format.

Read `README.md` beside this file first, then `shapes.py` (what a checkpoint holds) and `demo.py` (how one is written).
"""
