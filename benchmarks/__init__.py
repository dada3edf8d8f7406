"""Speed and memory, each against a named rival or a bare loop.

One module per benchmark, each with ``measure(plan) -> Outcome``; ``python -m benchmarks`` runs them.
"""
