"""Fused operations for masked diffusion language models, usable on their own as drop-in replacements.

Every operation takes `backend=None` (the fastest that can run on the inputs) or a backend's name; `describe_backends()`
prints the backends that run on this machine. Transformers, Triton and the compiled extension are loaded when needed.
"""

from . import attention as _attention
from . import denoiser_statistics as _denoiser_statistics
from . import layers
from . import masked_cross_entropy as _masked_cross_entropy
from . import topk_unmask as _topk_unmask
from .attention import (
    bidirectional_attention,
    bidirectional_attention_varlen,
    block_diffusion_attention,
    masked_attention,
)
from .chunks import slices_of_rows
from .denoiser_statistics import DenoiserStatistics, linear_denoiser_statistics, soft_embedding
from .masked_cross_entropy import kl_divergence as _kl_divergence
from .masked_cross_entropy import linear_masked_cross_entropy, masked_cross_entropy
from .masked_cross_entropy.kl_divergence import linear_masked_kl_divergence
from .topk_unmask import (
    Scores,
    Unmasked,
    filter_logits,
    linear_token_scores,
    linear_topk_unmask,
    pack_allowed,
    philox_uniform,
    token_scores,
    topk_unmask,
)

__version__ = "0.1.0"

__all__ = [
    "DenoiserStatistics", "Scores", "Unmasked", "apply_dllm_kernels_to_dream", "apply_dllm_kernels_to_llada",
    "apply_dllm_kernels_to_llama", "apply_dllm_kernels_to_qwen2", "apply_dllm_kernels_to_qwen3",
    "bidirectional_attention", "bidirectional_attention_varlen", "block_diffusion_attention", "describe_backends",
    "filter_logits", "layers", "linear_denoiser_statistics", "linear_masked_cross_entropy",
    "linear_masked_kl_divergence", "linear_token_scores", "linear_topk_unmask", "masked_attention",
    "masked_cross_entropy", "pack_allowed", "philox_uniform", "register_attention", "slices_of_rows", "soft_embedding",
    "token_scores", "topk_unmask",
]


def describe_backends() -> str:
    """Print, for each operation and backend, whether it runs here and if not why; returns the text."""
    tables = {**_attention.BACKENDS, **_masked_cross_entropy.BACKENDS, **_kl_divergence.BACKENDS,
              **_topk_unmask.BACKENDS, **_denoiser_statistics.BACKENDS}
    lines = [f"{op:<32} {backend.name:<10} {'no: ' + reason if (reason := backend.missing()) else 'yes'}"
             for op, backends in tables.items() for backend in backends]
    text = "\n".join([f"{'operation':<32} {'backend':<10} runs here", *lines])
    print(text)
    return text


def __getattr__(name: str):
    if name in __all__:  # the patches, which need Transformers
        from . import patch

        return getattr(patch, name)
    raise AttributeError(f"module 'dllm_kernels' has no attribute {name!r}")
