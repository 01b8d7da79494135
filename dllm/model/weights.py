"""The parameters of published checkpoints as ours, and back.

Three things differ: names (a family's `parameters`), query, key and value as one matrix [q rows; k rows; v rows], and
experts, of which ours are one tensor [experts, out, in] per projection. Both directions keep every bit. They work on
tensors without storage too, so that the names and shapes a checkpoint must have are known before it is read.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dllm.families import FAMILIES, ModelConfig

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")
_QKV = "self_attn.qkv_proj."


def to_ours(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `DiffusionLM(config)` from that of a published checkpoint."""
    rename = _renaming({theirs: ours for theirs, ours in FAMILIES[config.family].parameters.items()})
    ours: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for published, tensor in state.items():
        name = rename(published)
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
        elif _QKV in name:
            for part, rows in zip("qkv", tensor.split(_rows(config)), strict=True):
                ours[name.replace("qkv_proj", f"{part}_proj")] = rows.contiguous()
        else:
            ours[name] = tensor
    for name, members in experts.items():
        ours[name] = torch.stack([members[expert] for expert in sorted(members)])
    return ours


def to_published(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    parameters = FAMILIES[config.family].parameters
    rename = _renaming({ours: theirs for theirs, ours in parameters.items()})
    fused = any("qkv_proj" in ours for ours in parameters.values())
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _EXPERTS.fullmatch(name):
            published |= {rename(f"{match[1]}.{expert}.{match[2]}.weight"): one.contiguous()
                          for expert, one in enumerate(tensor.unbind(0))}
        elif fused and "self_attn.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            published[rename(name.replace("q_proj", "qkv_proj"))] = torch.cat(parts)
        elif not (fused and ("self_attn.k_proj." in name or "self_attn.v_proj." in name)):
            published[rename(name)] = tensor
    return published


def _rows(config: ModelConfig) -> tuple[int, int, int]:
    """Of the query, key and value in their one matrix."""
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys


def _renaming(names: Mapping[str, str]):
    """A function that renames whole modules; {i} stands for a layer's number."""
    patterns = [(re.compile(re.escape(old).replace(r"\{i\}", r"(\d+)") + r"(?=\.|$)"), new.replace("{i}", r"\1"))
                for old, new in names.items()]

    def rename(name: str) -> str:
        for pattern, new in patterns:
            if match := pattern.match(name):
                return match.expand(new) + name[match.end():]
        return name

    return rename
