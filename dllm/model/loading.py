"""A model for use and its tokenizer, on the device and in the dtype asked for."""

import os
import warnings
from pathlib import Path

from dllm.errors import Notice
from dllm.files import read_json
from dllm.model.devices import find_device
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.tokenizer import check_vocabulary, load_tokenizer
from dllm.model.transformer import Transformer
from dllm.model.weights import find_model


def is_diffusion_gemma(folder: Path) -> bool:
    return read_json(folder / "config.json").get("model_type") == "diffusion_gemma"


def load_with_tokenizer(path_or_hub_id: str | os.PathLike, device: str = "auto", dtype: str = "auto", *,
                        mask_token_id: int | None = None, mask_token: str | None = None,
                        trust_remote_code: bool = False, layers_backend: str = "auto"):
    """A model for use, and its tokenizer.

    Args:
        device: cpu, cuda, cuda:N, or auto: the GPU if there is one.
        dtype: float32, bfloat16, float16, or auto: bfloat16 on a GPU, else float32.
        mask_token_id, mask_token: the mask token, where the folder does not name it or names another.
        trust_remote_code: let the folder's own code make the tokenizer.
        layers_backend: see `Transformer.layers_backend`.
    Raises: UserError if they cannot be loaded, do not fit each other, or there is no such device.
    """
    place = find_device(device)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    folder = find_model(path_or_hub_id)
    kind = DiffusionGemma if is_diffusion_gemma(folder) else Transformer
    model = kind.from_pretrained(folder, dtype, place, mask_token_id=mask_token_id, mask_token=mask_token,
                                 trust_remote_code=trust_remote_code, layers_backend=layers_backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*: the tokens that end a text", Notice)  # the model has told of them
        tokenizer = load_tokenizer(path_or_hub_id, model.mask_token_id, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, model.config.vocab_size)
    model.end_token_ids = tokenizer.end_token_ids
    return model, tokenizer
