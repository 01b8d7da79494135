"""Measures: likelihood bounds, accuracies and infilled lines of held-out text; code benchmarks, judged in a sandbox;
lm-eval. The baselines are scored on the very positions that the model is scored on.
"""
