"""The weights of published checkpoints: finding their folder, reading their files, their parameters as ours, and back.

Three things differ: names (a family's `parameters`), query, key and value as one matrix [q rows; k rows; v rows], and
experts, of which ours are one tensor [experts, out, in] per projection. Both directions keep every bit. They work on
tensors without storage too, so that the names and shapes a checkpoint must have are known before it is read.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dllm.errors import UserError, first_line, warn
from dllm.files import read_json, write_atomically
from dllm.model.borrowed import matrix_names
from dllm.model.families import ModelConfig
from dllm.model.family_table import EDIT_FAMILIES, FAMILIES
from dllm.model.gguf import as_folder

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")
_QKV = "self_attn.qkv_proj."


def find_model(path_or_hub_id: str | os.PathLike, weights: bool = True) -> Path:
    """The local folder of a model, downloaded from the hub if it is not one already. Its code is data here: nothing
    runs it.

    Args:
        path_or_hub_id: a GGUF file has a folder in the cache.
        weights: False downloads the rest alone, for a tokenizer.
    Raises: UserError if there is no such folder and no such repository can be reached.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise UserError(f"a model is a folder, a hub repository as owner/name, or a GGUF file, not {path_or_hub_id!r}")
    folder = Path(as_folder(os.path.expanduser(path_or_hub_id)))
    if folder.is_dir():
        check_is_model(folder, weights)
        return folder
    name = str(path_or_hub_id)
    if folder.is_file():
        raise UserError(f"{name} is a file; give its folder, which holds config.json too")
    if name.lower().endswith(".gguf"):
        raise UserError(f"{name} does not exist; give the path of a GGUF file that does")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"{name} is not a folder; give a model folder, or a hub repository as owner/name")
    from huggingface_hub import snapshot_download

    try:
        rest = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
        folder = Path(snapshot_download(name, allow_patterns=[*rest, "*.safetensors"] if weights else rest))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*rest, "pytorch_model*.bin"]))
        return folder
    except Exception as error:  # the hub client raises a dozen kinds; each means: not to be had
        raise UserError(f"{name} is neither a folder here nor a hub repository that can be reached "
                        f"({first_line(error)})") from error


def check_is_model(folder: Path, weights: bool) -> None:
    """Refuse the folder of an adapter, or of a run, whose models are further below."""
    wanted = ("config.json",) if weights else ("config.json", "tokenizer.json", "vocab.json", "tokenizer.model")
    if any((folder / name).exists() for name in wanted):
        return
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(f"{folder} is an adapter of {base}, not a model; merge them with PEFT's merge_and_unload, and "
                        "give the folder that save_pretrained then writes")
    steps = [str(path) for below in ("checkpoints/global_step_*/", "global_step_*/", "")
             for path in folder.glob(f"{below}hf_ckpt")]
    if steps:
        newest = max(steps, key=lambda path: (len(path), path))
        raise UserError(f"{folder} belongs to a training run, whose model is in {newest}; give that")


_SINGLE = ("model.safetensors", "pytorch_model.bin")
_DRAFTING = "linear_spec_lora"  # beside Nemotron-Labs-Diffusion


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names, or else of PyTorch's older files.

    Where several are there, the first in this order is read, as by Transformers, and one warning says so.
    """
    found = [file for name in _SINGLE for file in (name, f"{name}.index.json") if (folder / file).exists()]
    if not found:
        raise UserError(f"{folder / _SINGLE[0]} does not exist; a model folder holds config.json and model.safetensors")
    if len(found) > 1:
        warn(f"{folder} holds weights in {' and in '.join(found)}; those of {found[0]} are taken, as in Transformers; "
             "remove the others, or this one if it is older")
    if (folder / _DRAFTING).is_dir():
        warn(f"{folder / _DRAFTING} is left out: an adapter that drafts for self-speculation, and changes nothing else")
    files = found[:1]
    if files[0].endswith(".index.json"):
        files = _read_index(folder / files[0])
    state: dict[str, Tensor] = {}
    for file in files:
        tensors = _read_tensors(folder / file)
        if twice := sorted(state.keys() & tensors.keys()):
            warn(f"{folder}: {twice[0]} is in {file} and in an earlier file; that in {file} is taken, as in "
                 "Transformers")
        state |= tensors
    return state


def _read_index(path: Path) -> list[str]:
    """The names of the files that hold the weights, sorted."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path} has no weight_map, which names the file of every parameter; fetch or save it again")
    return sorted({*files.values()})


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; a model folder holds config.json and model.safetensors") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} is truncated or corrupt ({first_line(error)}); fetch or save it again") from None
    if not (isinstance(tensors, dict) and all(isinstance(tensor, Tensor) for tensor in tensors.values())):
        raise UserError(f"{file} does not hold weights alone, by their names; save what the model's state_dict() gives")
    return tensors


def write_folder(folder: Path, config: dict, state: Mapping[str, Tensor], code: Mapping[str, bytes] | None = None,
                 defaults: dict | None = None) -> None:
    """Write a model folder: weights by their published names (5 GB shards), code, generation_config.json, config.json.

    Each file is written beside its place and renamed into it; config.json comes last, so a folder with one is whole.
    Raises: Failure if the disk is full or the folder cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    shards = split_torch_state_dict_into_shards(state, max_shard_size="5GB")
    for file, names in shards.filename_to_tensors.items():
        write_atomically(folder / file, save({name: state[name] for name in names}, metadata={"format": "pt"}))
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_atomically(folder / "model.safetensors.index.json", _dump(index))
    for name, content in (code or {}).items():
        write_atomically(folder / name, content)
    if defaults is not None:
        write_atomically(folder / "generation_config.json", _dump(defaults))
    write_atomically(folder / "config.json", _dump(config))


def _dump(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def fit_config(config: ModelConfig, state: dict[str, Tensor], where: str) -> ModelConfig:
    """The configuration that the weights have, where config.json is known to contradict them. `state` loses what is no
    part of the language model."""
    if any(name.startswith(("language_model.", "model.language_model.")) for name in state):
        kept = {name.replace("language_model.", "", 1): tensor for name, tensor in state.items()
                if "language_model." in name or name.startswith("lm_head.")}
        state.clear()
        state |= kept
    if config.family == "llada2_moe" and not any(name.endswith("query_layernorm.weight") for name in state):
        config = replace(config, qk_norm=False)
    if config.family in EDIT_FAMILIES:  # the head of the model that it came from, which nothing reads
        for name in ("lm_head.weight", "model.transformer.ff_out.weight"):
            state.pop(name, None)
    if not config.tie_word_embeddings:
        return config
    if config.borrowed:
        return _untie_head(config, state, where, *matrix_names(config, where))
    names = _renaming({ours: theirs for theirs, ours in FAMILIES[config.family].parameters.items()})
    return _untie_head(config, state, where, names("model.embed_tokens.weight"), names("lm_head.weight"))


def _untie_head(config: ModelConfig, state: dict[str, Tensor], where: str, embedding: str, head: str) -> ModelConfig:
    """The configuration of weights that hold a head of their own although they should be tied.

    As in Transformers 5: equal matrices are tied, different ones are not, and where the embedding is missing the head
    stands for it.
    """
    if head not in state:
        return config
    if embedding not in state:
        state[embedding] = state[head]
    if torch.equal(state[embedding], state[head]):
        del state[head]
        return config
    warn(f"{where}: config.json ties the head to the embedding, but the weights hold another matrix as {head}, which "
         "is taken, as Transformers does")
    return replace(config, tie_word_embeddings=False)


def check_parameters(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str) -> None:
    """Refuse a checkpoint whose parameters, by name and shape, are not exactly those of the model; name them all."""
    misshapen = [f"{name} {list(shape)}, not {list(expected[name])}" for name, shape in sorted(found.items())
                 if name in expected and [*shape] != [*expected[name]]]
    problems = [f"{problem}: {', '.join(names)}" for problem, names in (
        ("missing", sorted(expected.keys() - found.keys())), ("unknown", sorted(found.keys() - expected.keys())),
        ("of another shape", misshapen)) if names]
    if problems:
        raise UserError(f"{where}: the parameters are not those of config.json. {'; '.join(problems)}")


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
