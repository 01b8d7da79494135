"""GGUF files, as llama.cpp writes them: read by Transformers, and kept as an ordinary model folder in the cache.

Reading takes minutes for a large model, so a file is read once; $DLLM_CACHE (default: ~/.cache/dllm) keeps its folder.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from dllm.errors import UserError, first_line
from dllm.files import cache_folder, cannot_write, write_json
from dllm.model.families import read_config
from dllm.model.rotary import Rotary

_REDUNDANT = {"_model_name_or_path", "_name_or_path", "unk_token_id", "quantization_config", "transformers_version"}
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)


def as_folder(path: str | os.PathLike) -> str | os.PathLike:
    """The path, or the folder of the model that it names as a GGUF file.

    A folder without other weights stands for the GGUF file in it, whatever config.json lies beside it.
    Raises: UserError if there are several, or the file cannot be read; Failure if the folder cannot be written.
    """
    place = Path(path)
    files = [place] if place.suffix.lower() == ".gguf" and place.is_file() else []
    if place.is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in place.iterdir()):
        files = sorted(file for file in place.iterdir() if file.suffix.lower() == ".gguf")
    if not files:
        return path
    if _PART.search(files[0].name):
        raise UserError(f"{files[0]} is a part of a GGUF file; join the parts with llama-gguf-split --merge")
    if len(files) > 1:
        raise UserError(f"{place} holds {len(files)} GGUF files; name one: {', '.join(file.name for file in files)}")
    return unpack(files[0])


def unpack(file: Path) -> Path:
    """The folder in the cache with the model and the tokenizer of a GGUF file, written where it is not there yet."""
    from filelock import FileLock

    file, status = file.resolve(), file.stat()
    key = hashlib.sha256(f"{file} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogatepass")).hexdigest()
    folder = cache_folder() / "gguf" / f"{file.stem}-{key[:12]}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():  # another process may have written it meanwhile
                shutil.rmtree(partial, ignore_errors=True)
                print(f"reading {file.name}, this once, into {folder}", file=sys.stderr)
                convert(file, partial)
                os.replace(partial, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, its quantised weights as fp32, and its tokenizer into a new folder.

    Raises: UserError if it cannot be read, or is of a family that this version does not load.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{file.name} needs the package gguf: pip install 'dllm[gguf]'") from None
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        reader = GGUFReader(file)
        described = AutoConfig.from_pretrained(**where)
        if described.model_type == "qwen3":  # Transformers' reader leaves it at 128
            described.head_dim = reader.fields["qwen3.attention.key_length"].contents()
        raw = {key: value for key, value in described.to_diff_dict().items() if key not in _REDUNDANT}
        raw = scale_rotary(raw | {"tie_word_embeddings": described.tie_word_embeddings}, reader, file)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, loading = AutoModelForCausalLM.from_pretrained(**where, config=described, dtype="float32",
                                                              output_loading_info=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # truncated, of an unknown architecture or quantisation: many types, one meaning
        raise UserError(f"{file} cannot be read as a GGUF model ({first_line(error)}); fetch it again, or take a model "
                        "of the Llama or Qwen line") from error
    state = model.state_dict()
    if raw["tie_word_embeddings"]:
        del state["lm_head.weight"]
    check_complete(file, reader, state, loading)
    raw |= {"architectures": [type(model).__name__], "dtype": "float32"}
    if (mask := reader.fields.get("tokenizer.ggml.mask_token_id")) is not None:
        raw["mask_token_id"] = int(mask.contents())
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", raw)


def scale_rotary(raw: dict, reader, file: Path) -> dict:
    """The config.json of a file with the rotary scaling that Transformers' reader leaves out.

    Llama 3.1 and later carry it as a tensor: the divisor of each frequency.
    Raises: UserError for any other scaling, or if config.json is none that this version loads.
    """
    config = read_config(raw, where=str(file))
    if config.borrowed:
        raise UserError(f"{file} is a {config.family}, and GGUF files are read of the Llama, Mistral and Qwen lines "
                        "alone; take the model's folder with safetensors instead")
    kind = next((field.contents() for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")), None)
    scaled = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    if not scaled and kind in (None, "none"):
        return raw
    if [tensor.name for tensor in scaled] == ["rope_freqs.weight"]:
        divisors = torch.from_numpy(scaled[0].data.copy()).flatten().float()
        llama3 = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        plain, scaling = (Rotary(replace(config, rope_scaling=value)).frequencies for value in (None, llama3))
        if torch.allclose(plain / scaling, divisors, rtol=1e-3):
            return raw | {"rope_parameters": {**raw.get("rope_parameters", {}), **llama3}}
    raise UserError(f"{file} scales its rotary embedding in a way ({kind or scaled[0].name}) that is not supported; "
                    "supported: that of Llama 3")


def check_complete(file: Path, reader, state: Mapping[str, torch.Tensor], loading: Mapping) -> None:
    """Refuse a file some of whose tensors Transformers' reader has passed over, such as biases of a Llama, and weights
    that it has drawn at random."""
    stored = sum(tensor.name != "rope_freqs.weight" for tensor in reader.tensors)
    drawn = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in loading[kind]]
    if drawn or stored != len(state):
        without = f", without {', '.join(sorted(drawn)[:3])}" if drawn else ""
        raise UserError(f"{file} holds {stored} tensors, of which Transformers makes a model of {len(state)}{without}; "
                        "take the model's folder with safetensors instead")
