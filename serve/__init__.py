"""Serving with the real vLLM: what `serve/launch.sh` runs once the environment is there.

Read `README.md` beside this file first, then `launch.py`: it is the story, and the other modules are its parts.
"""
