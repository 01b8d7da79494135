"""A training run: batches, the loop, optimizers, processes, checkpoints, what it costs, export."""
