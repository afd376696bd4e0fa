"""Time and memory of whole commands, beside the goals and beside other ways: `python -m benchmarks.speed`."""
