"""attnlens beside TransformerLens, WeightWatcher and the dense way: `python -m benchmarks.suite`."""
