"""How fast this is beside others and beside what the machine can do: `python -m benchmarks`."""
