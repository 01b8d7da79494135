"""Code benchmarks: tasks, presets, samples, and their verdicts."""
