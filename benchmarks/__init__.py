"""Programs that print every figure in the docs: `python -m benchmarks.NAME [--quick] [--json]`."""
