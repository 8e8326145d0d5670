"""The executor: batches, KV pages, sampling, the runner and the engine."""
