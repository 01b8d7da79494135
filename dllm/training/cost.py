"""The cost of a model and of a training step: parameters, floating-point operations, memory.

Symbols: D hidden size, M inner size of SwiGLU, E head size, Hq/Hkv heads, V vocabulary, n layers, T tokens.
"""

import torch
from torch import Tensor

from dllm.config.schema import TrainGroup
from dllm.model.families import ModelConfig

# Dense bf16 operations per second, from NVIDIA's data sheets; the longest name that is part of the device's counts.
PEAK_FLOPS = {"A100": 312e12, "A30": 165e12, "A10": 125e12, "L4": 121e12, "L40S": 362e12, "L40": 181e12,
              "RTX 4090": 165e12, "H100": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "GH200": 989e12, "H800": 989e12,
              "H20": 148e12, "B200": 2250e12, "GB200": 2450e12, "B300": 2250e12}


def layer_matrices(config: ModelConfig) -> int:
    """Elements of the matrices that multiply a token, in all layers (only the experts to which it is routed)."""
    D, E = config.hidden_size, config.head_dim
    attention = 2 * D * E * (config.num_attention_heads + config.num_key_value_heads)
    total = 0
    for index in range(config.num_hidden_layers):
        width = config.intermediate_size
        if config.has_experts(index):
            width = config.moe_intermediate_size * (config.num_experts_per_tok + config.num_shared_experts)
        total += attention + 3 * D * width
    return total


def step_flops(config: ModelConfig, tokens: float, pairs: float, scored: float) -> float:
    """Operations of forward and backward: a multiplication and an addition are two, and backward costs two forwards.

    Recomputed activations, the head at positions that are not scored, and a teacher do not count.

    Args:
        pairs: (query, key) pairs that attend to each other, over all documents.
        scored: positions that have a loss.
    """
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return 6 * (layer_matrices(config) * tokens + attention + config.hidden_size * config.vocab_size * scored)


def count_pairs(cu_seqlens: Tensor, objective: str, block_length: int | None, causal_blocks: bool = False,
                causal_context: bool = False) -> int:
    """(query, key) pairs that attend to each other in packed documents, cu_seqlens [S + 1], under an objective."""
    lengths = cu_seqlens.diff().long()
    causal = lengths * (lengths + 1) // 2  # a token sees everything up to itself
    if objective == "ar":
        return int(causal.sum())
    if objective == "block_diffusion":  # each copy is causal, or a token sees everything up to the end of its block
        whole, rest = lengths // block_length, lengths % block_length
        blocks = block_length**2 * whole * (whole + 1) // 2 + rest * lengths
        noisy, clean = (causal if which else blocks for which in (causal_blocks, causal_blocks or causal_context))
        return int((noisy + clean).sum())
    return int((lengths * lengths).sum())


def count_copies(objective: str) -> int:
    """Copies of each token that the layers compute: block diffusion has a noisy and a clean one."""
    return 2 if objective == "block_diffusion" else 1


def peak_flops(device: torch.device) -> float | None:
    """Operations per second in bf16, from the data sheet of the device; None if unknown."""
    name = torch.cuda.get_device_name(device)
    known = [peak for peak in PEAK_FLOPS if peak in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def estimate_memory(config: ModelConfig, parameters: int, trainable: int, states: int, settings: TrainGroup,
                    tokens: int, processes: int, bf16: bool) -> dict[str, float]:
    """Bytes that a device needs in training, by purpose.

    Args:
        parameters, trainable: of the whole model.
        states: numbers that the optimizers keep (`count_states`).
        tokens: of a micro-batch.
    """
    shards = processes if settings.data_parallel_mode == "fsdp2" else 1
    number = 2 if bf16 else 4
    D, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    width = max(config.intermediate_size, 1)
    if config.has_experts(config.num_hidden_layers - 1):
        dense = config.num_shared_experts * config.moe_intermediate_size if config.canvas_length is None else width
        width = config.moe_intermediate_size * config.num_experts_per_tok + dense
    # Backward needs from a layer: the inputs of its two norms and of its products, queries, keys and values before and
    # after the rotation, the output of attention, and four tensors of the inner size.
    layer = (4 * D + 3 * heads + 3 * groups + 4 * width) * number
    kept = D * number if settings.enable_gradient_checkpointing else layer
    own_tokens = count_copies(settings.objective) * tokens / settings.ulysses_parallel_size
    return {"weights": 4 * parameters / shards, "gradients": 4 * trainable / shards,
            "teacher": number * parameters if settings.repr_align_wt else 0, "optimizer": 4 * states / shards,
            "weights in bf16": 2 * parameters / (config.num_hidden_layers if shards > 1 else 1) if bf16 else 0,
            "activations": own_tokens * (config.num_hidden_layers * kept + layer + 6 * D * number)}
