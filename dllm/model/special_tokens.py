"""Special tokens of a model folder: the mask token, and the tokens that end a text. Three files may name each of them.

generation_config.json goes before config.json, as in Transformers, and both before the tokenizer. Nothing here imports
torch or loads a tokenizer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm.errors import UserError, warn
from dllm.files import read_json

# What published tokenizers call their mask token; taken where no file says which one it is.
MASKS = ("<|mask|>", "<|MASK|>", "|<MASK>|", "<|mdm_mask|>", "<[MASK_TOKEN]>", "[MASK]", "<mask>")

_MAP = "special_tokens_map.json"  # older than tokenizer_config.json, which goes before it


@dataclass(frozen=True)
class SpecialTokens:
    mask: int | None
    ends: tuple[int, ...]  # each of them ends a text
    renoises: bool = False  # the model (DiffusionGemma) has no mask token, also where its vocabulary has one


def read_special_tokens(folder: Path, mask_is_given: bool = False) -> SpecialTokens:
    """What the files of a folder say. One warning tells of each token that they do not agree on.

    Args:
        mask_is_given: the user has named the mask token, so that it does not matter what the files say.
    """
    files = {name: read_json(folder / name, missing={}) for name in ("generation_config.json", "config.json")}
    vocabulary = Vocabulary(folder)
    renoises = files["config.json"].get("model_type") == "diffusion_gemma"
    mask_is_given |= renoises
    for name, raw in files.items():
        check_ids(raw, str(folder / name))
    masks = {name: raw["mask_token_id"] for name, raw in files.items() if raw.get("mask_token_id") is not None}
    ends = {name: sorted(as_ids(raw.get("eos_token_id"))) for name, raw in files.items()}
    masks |= vocabulary.named("mask_token")
    ends |= {name: [end] for name, end in vocabulary.named("eos_token").items()}
    ends = {name: ids for name, ids in ends.items() if ids}
    if len(set(masks.values())) > 1 and not mask_is_given:
        warn(f"{folder}: the mask token is {_in_words(masks)}; {next(iter(masks.values()))} is taken")
    if len(set(map(tuple, ends.values()))) > 1 and not renoises:  # its files never agree
        warn(f"{folder}: the tokens that end a text are {_in_words(ends)}; each of them ends one")
    mask = next(iter(masks.values())) if masks else next(filter(None, map(vocabulary.find, MASKS)), None)
    return SpecialTokens(None if renoises else mask, tuple(unique(token for ids in ends.values() for token in ids)),
                         renoises)


def check_ids(raw: Mapping, where: str) -> None:
    """Refuse a file that names the mask token or those that end a text otherwise than by whole numbers."""
    for key, many in (("mask_token_id", False), ("eos_token_id", True)):
        named = raw.get(key)
        ids = named if many and isinstance(named, list) else [] if named is None else [named]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise UserError(f"{where}: {key} must be a whole number{' or a list of them' * many}, not {named!r}")


def as_ids(named: int | list[int] | None) -> list[int]:
    """The tokens that a key such as eos_token_id names. -1 names none, as older configurations have it."""
    return [token for token in (named if isinstance(named, list) else [named]) if token is not None and token >= 0]


def unique(ids: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _in_words(places: Mapping[str, object]) -> str:
    return ", ".join(f"{value} in {place}" for place, value in places.items())


class Vocabulary:
    """The ids of special tokens, by the tokenizer's files alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = read_json(folder / "tokenizer_config.json", missing={})
        self.added = {**read_json(folder / "added_tokens.json", missing={}), **{
            token["content"]: int(token_id) for token_id, token
            in (self.settings.get("added_tokens_decoder") or {}).items()}}
        self._words: Mapping[str, int] | None = None

    @property
    def words(self) -> Mapping[str, int]:
        """The whole vocabulary, as far as JSON files have it."""
        if self._words is None:
            backend = read_json(self.folder / "tokenizer.json", missing={})
            words = (backend.get("model") or {}).get("vocab") or read_json(self.folder / "vocab.json", missing={})
            if isinstance(words, list):  # Unigram: [token, score]
                words = {token: index for index, (token, _) in enumerate(words)}
            self._words = {**words, **{token["content"]: token["id"] for token in backend.get("added_tokens") or ()}}
        return self._words

    def find(self, text: str) -> int | None:
        return self.added[text] if text in self.added else self.words.get(text)

    def named(self, name: str) -> dict[str, int]:
        """The id of what a key such as mask_token names, by its place; two of them where the two files differ."""
        places = {}
        for place, raw in (("the tokenizer", self.settings), (_MAP, read_json(self.folder / _MAP, missing={}))):
            given = raw.get(name)
            text = given.get("content") if isinstance(given, dict) else given
            token = self.find(text) if isinstance(text, str) else None
            if token is not None and token not in places.values():
                places[place] = token
        return places
