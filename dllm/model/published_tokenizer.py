"""Tokenizers as they are published: tokenizer.json, the older vocab.json with merges.txt or tokenizer.model, and code.

Folders of diffusion models often name a class of their own code (Dream's DreamTokenizer is Qwen2's byte-level BPE). No
code runs and nothing is asked: such files are read by the class of Transformers that computes the same.
"""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

from dllm.errors import UserError, warn
from dllm.files import decode_text, read_json

_KEPT = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "additional_chat_templates")


def open_tokenizer(folder: Path, trust_remote_code: bool = False):
    """The tokenizer of a folder, as its files say.

    Raises: UserError if tokenizer.model is there alone and sentencepiece is not installed; what Transformers raises.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = read_json(folder / "tokenizer_config.json", missing={})
    _compare_templates(folder, settings)
    if trust_remote_code:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    if (folder / "tokenizer.json").exists():
        if not settings.get("auto_map"):
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **_unread_config(folder))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer.init_kwargs.pop("auto_map", None)  # the saved tokenizer needs no code
        return tokenizer
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _open_byte_level_bpe(folder, settings)
    if (folder / "tokenizer.model").exists():
        return _open_sentencepiece(folder, settings)
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _compare_templates(folder: Path, settings: dict) -> None:
    """Tell of a chat template in tokenizer_config.json that the one in a file of its own replaces."""
    file, inside = folder / "chat_template.jinja", settings.get("chat_template")
    if inside and file.exists() and _lines(str(inside)) != _lines(decode_text(file.read_bytes())):
        warn(f"{folder}: the chat templates in tokenizer_config.json and {file.name} differ; that in {file.name} is "
             "taken, as in Transformers")


def _lines(template: str) -> list[str]:
    return template.strip().splitlines()  # whose ends differ between systems


def _unread_config(folder: Path) -> dict:
    """Arguments that keep Transformers from warning of a model_type that it does not know."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    known = read_json(folder / "config.json", missing={}).get("model_type", "llama") in CONFIG_MAPPING
    return {} if known else {"config": PreTrainedConfig()}


def _open_byte_level_bpe(folder: Path, settings: dict):
    """vocab.json and merges.txt, as GPT-2 cuts text or as Qwen2 does."""
    from transformers import GPT2Tokenizer, Qwen2Tokenizer

    named = settings.get("tokenizer_class") or read_json(folder / "config.json", missing={}).get("model_type", "")
    added = settings.get("added_tokens_decoder") or {
        str(token_id): {"content": text, "special": True, "normalized": False}
        for text, token_id in read_json(folder / "added_tokens.json", missing={}).items()}
    # Added tokens have ids of their own, but Transformers counts on from vocab.json's last one, unless they are in it.
    words = {**read_json(folder / "vocab.json"), **{token["content"]: int(index) for index, token in added.items()}}
    kind = GPT2Tokenizer if named.lower().startswith(("gpt2", "llama", "mistral")) else Qwen2Tokenizer
    return _open_as(kind, folder, {**settings, "added_tokens_decoder": added}, {
        "vocab.json": json.dumps(words).encode(), "merges.txt": (folder / "merges.txt").read_bytes()})


def _open_sentencepiece(folder: Path, settings: dict):
    from transformers import LlamaTokenizer

    if importlib.util.find_spec("sentencepiece") is None:
        raise UserError(f"{folder} has its tokenizer in tokenizer.model alone, which needs sentencepiece: pip install "
                        "sentencepiece")
    return _open_as(LlamaTokenizer, folder, settings, {
        "tokenizer.model": (folder / "tokenizer.model").read_bytes()})


def _open_as(kind: type, folder: Path, settings: dict, files: dict[str, bytes]):
    """The tokenizer of class `kind` in these files, with the folder's settings and chat template."""
    settings = {name: value for name, value in settings.items() if name not in ("auto_map", "tokenizer_class")}
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for kept in filter(Path.exists, (folder / name for name in _KEPT)):
            (shutil.copytree if kept.is_dir() else shutil.copy)(kept, copy / kept.name)
        for file, content in {**files, "tokenizer_config.json": json.dumps(settings).encode()}.items():
            (copy / file).write_bytes(content)
        tokenizer = kind.from_pretrained(str(copy))
    tokenizer.name_or_path = str(folder)
    return tokenizer
