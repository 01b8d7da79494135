"""Evaluators: plain functions from (model, tokenizer, documents, settings) to a small frozen result, and the scoring of
samples by running them in a sandbox, which needs no model.

The same seed gives the same windows, corrupted positions and numbers; the baselines are scored on the very positions
that the model is scored on. The names below are imported when they are first used: scoring needs no torch.
"""

from importlib import import_module

_HOME = {
    "BaselineResult": "baselines", "NgramCounts": "baselines", "baseline_accuracy": "baselines",
    "count_ngrams": "baselines",
    "HeldOutSettings": "held_out",
    "InfillingExample": "infilling", "InfillingResult": "infilling", "InfillingSettings": "infilling",
    "line_infilling": "infilling",
    "Likelihood": "perplexity", "MaskedResult": "perplexity", "PerplexityResult": "perplexity",
    "bound_likelihood": "perplexity", "masked_accuracy": "perplexity", "perplexity_bound": "perplexity",
    "pass_at_k": "estimates",
    "Limits": "sandbox", "Outcome": "sandbox", "Sandbox": "sandbox",
    "score_samples": "scoring",
    "Task": "tasks", "TaskSet": "tasks", "read_tasks": "tasks",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dllm.evaluators' has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(f"dllm.evaluators.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
