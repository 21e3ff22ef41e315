"""The engine's life: read `supervise.py` first.

`process.py` and `stopping.py` are its processes and our signals; `ready.py`, `canary.py` and `progress.py` the way to
the first answers; `heartbeat.py`, `faults.py`, `fault_log.py` and `isolation.py` what is watched then; `restarts.py`,
`events.py` and `systemd.py` what follows from it. No torch and no engine is imported.
"""
