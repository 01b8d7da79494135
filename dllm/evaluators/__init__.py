"""Evaluators: plain functions from (model, tokenizer, documents, settings) to a small frozen result.

The same seed gives the same windows, corrupted positions and numbers; the baselines are scored on the very positions
that the model is scored on.
"""

from dllm.evaluators.baselines import BaselineResult, NgramCounts, baseline_accuracy, count_ngrams
from dllm.evaluators.held_out import HeldOutSettings
from dllm.evaluators.infilling import InfillingExample, InfillingResult, InfillingSettings, line_infilling
from dllm.evaluators.perplexity import (
    Likelihood,
    MaskedResult,
    PerplexityResult,
    bound_likelihood,
    masked_accuracy,
    perplexity_bound,
)

__all__ = [
    "BaselineResult", "HeldOutSettings", "InfillingExample", "InfillingResult", "InfillingSettings", "Likelihood",
    "MaskedResult", "NgramCounts", "PerplexityResult", "baseline_accuracy", "bound_likelihood", "count_ngrams",
    "line_infilling", "masked_accuracy", "perplexity_bound",
]
