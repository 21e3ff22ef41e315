"""The load of `perf serve`: in come a workload's name, a seed and an endpoint, out come requests and what they took.

Read in this order: `workloads.py` (what is asked: lengths and token ids from a seed), `points.py` (how hard),
`endpoint.py` and `site.py` (who answers, with which model, on which machine), `client.py` (the engine's own load
client, handled from here) with `worker.py` (the process it runs in), `checks.py` (what is never reported), `table.py`.
"""
