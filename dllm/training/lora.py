"""Low-rank adapters (LoRA, arXiv:2106.09685) through PEFT: W + alpha / rank B A, of which only A and B are trained."""

import torch
from torch import Tensor, nn

from dllm.errors import UserError
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.transformer import Transformer

_NAME = "default"


def add_adapters(model: Transformer | DiffusionGemma, rank: int, alpha: float) -> None:
    """Freeze the model and put an adapter on every linear map inside its layers, but those that route to experts in a
    DiffusionGemma, whose balance a small corpus would upset (as in NeMo Automodel).

    Raises: UserError if PEFT is not installed, or the layers have no linear maps.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("train.lora_rank needs PEFT: pip install 'dllm[train]'") from None
    inside = {id(module) for module in model.layers.modules()}
    targets = [name for name, module in model.named_modules()
               if isinstance(module, nn.Linear) and id(module) in inside and ".router." not in name]
    if not targets:
        raise UserError(f"train.lora_rank adapts the linear maps inside the layers, and those of {model.config.family} "
                        "have none by that name; set train.lora_rank=0")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)


@torch.no_grad()
def merge(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model by name, without adapters: each product is added to the matrix that it adapts.

    The matrices that are not adapted are the same tensors. An empty dictionary stays empty.
    """
    scaling = {name: module.scaling[_NAME] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    merged = {}
    for name, weight in weights.items():
        module, base, kind = name.partition(".base_layer.")
        if base and kind == "weight":
            a, b = (weights[f"{module}.lora_{part}.{_NAME}.weight"].float() for part in "AB")
            merged[f"{module}.weight"] = (weight.float() + scaling[module] * (b @ a)).to(weight.dtype)
        elif base:
            merged[f"{module}.{kind}"] = weight
        elif ".lora_" not in name:
            merged[name] = weight
    return merged
