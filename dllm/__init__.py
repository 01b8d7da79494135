"""dllm: train, evaluate and sample masked diffusion language models.

The public names are imported when they are first used, so `import dllm` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "DiffusionLM": "diffusion_lm", "ModelConfig": "model.families",
    "GenerationOutput": "generation.sampler", "MDMGenerationConfig": "generation.config",
    "load_tokenizer": "model.tokenizer",
    "UserError": "errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dllm' has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(f"dllm.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
