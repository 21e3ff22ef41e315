"""Several servers as one engine, one launcher on each: read `node.py` first, which has the flags and the ports.

`interfaces.py` are this machine's, `meeting.py` is before the engines start, `link.py` while they run, `headless.py` is
the program of all nodes but the first.
"""
