"""Tokenizers: published ones, given a mask token where they lack one, and a byte-level BPE trained on the corpus."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dllm.errors import UserError, first_line
from dllm.model.published_tokenizer import open_tokenizer
from dllm.model.special_tokens import read_special_tokens, unique
from dllm.model.weights import find_model

MASK, END, PAD = "<|mask|>", "<|endoftext|>", "<|pad|>"
_GUARD = "\ufdd0"  # breaks a special token that a message spells; Unicode promises that it is no character


def load_tokenizer(path_or_hub_id: str | os.PathLike, mask_token_id: int | None = None, *,
                   mask_token: str | None = None, trust_remote_code: bool = False):
    """The fast tokenizer of a local folder, GGUF file or hub repository, with a mask token.

    Args:
        mask_token_id, mask_token: the mask token, by its id or its text; else what the folder's generation_config.json,
            config.json or tokenizer name, in this order. With none, "<|mask|>" is added.
        trust_remote_code: let the folder's own code make the tokenizer. No code of a folder runs otherwise.
    Returns: a `transformers.PreTrainedTokenizerFast`; its attribute `end_token_ids` lists all tokens that end a text.
        That of a DiffusionGemma has no mask token.
    Raises: UserError if it cannot be loaded, or has no such mask token.
    """
    folder = find_model(path_or_hub_id, weights=False)
    try:
        tokenizer = open_tokenizer(folder, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # missing, truncated or of an unknown kind: many types, one meaning
        raise UserError(f"cannot load a tokenizer from {find_damaged(folder)} ({first_line(error)}); give a folder "
                        "with tokenizer.json, or a hub repository as owner/name") from error
    named = read_special_tokens(folder, mask_is_given=(mask_token_id, mask_token) != (None, None))
    if named.renoises:
        tokenizer.mask_token = None
        tokenizer.begins_texts = True
    else:
        set_mask_token(tokenizer, mask_token_id, mask_token, named.mask)
    ends = [token for token in named.ends if token < len(tokenizer)]
    if tokenizer.eos_token_id is None and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokenizer.end_token_ids = unique([*own, *named.ends])
    return tokenizer


def find_damaged(folder: Path) -> Path:
    """The file of a tokenizer that is not JSON in UTF-8; the folder if there is none."""
    for file in sorted([*folder.glob("*token*.json"), *folder.glob("vocab.json")]):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return file
    return folder


def set_mask_token(tokenizer, token_id: int | None, text: str | None, named: int | None) -> None:
    """Give a tokenizer the mask token that was asked for, else the one that its folder names, else a new one."""
    roles = {word: role for role, word in tokenizer.special_tokens_map.items()
             if isinstance(word, str) and role != "mask_token"}
    if text is not None:
        known = tokenizer.get_vocab().get(text)
        if known is None:
            free = [word for word in tokenizer.get_added_vocab() if word not in roles]
            more = f" and {len(free) - 5} more" if len(free) > 5 else ""
            raise UserError(f"mask_token {text!r} is none of the tokenizer's {len(tokenizer):,} tokens; of its added "
                            f"tokens {', '.join(free[:5]) or 'none'}{more} can be chosen")
        if token_id not in (None, known):
            raise UserError(f"mask_token {text!r} has the id {known}, not {token_id}; give one of the two")
        token_id = known
    chosen = named if token_id is None else token_id
    if chosen not in (None, tokenizer.mask_token_id):
        if not 0 <= chosen < len(tokenizer):
            raise UserError(f"the model's mask token is {chosen}, the tokenizer has {len(tokenizer)} tokens; give "
                            "the model's own tokenizer, or another mask token")
        word = tokenizer.convert_ids_to_tokens(chosen)
        if word in roles and chosen != named:
            raise UserError(f"mask_token {word!r} is the tokenizer's {roles[word]} already; choose a reserved token")
        tokenizer.mask_token = word
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE (arXiv:1508.07909, on bytes as GPT-2) of `vocab_size` tokens, which any text survives unchanged.

    The same texts give the same tokenizer. The ids 0, 1 and 2 are "<|endoftext|>" (eos), "<|pad|>" and "<|mask|>".

    Returns: a `transformers.PreTrainedTokenizerFast`.
    Raises: UserError if vocab_size is below 259, the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 259:
        raise UserError(f"vocab_size must be at least 259 (256 bytes and 3 special tokens), not {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PAD, MASK], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, mask_token=MASK,
                                   clean_up_tokenization_spaces=False)


def encode(tokenizer, text: str, *, after: bool = False) -> Tensor:
    """int64 [N], with nothing added: documents are trained on without a beginning-of-text token.

    A special token that the text spells ("<|im_end|>") stays text.
    Args:
        after: the text stands after another, so it gets no blank, which SentencePiece tokenizers put before a text.
    Raises: UserError if the text has half of a surrogate pair, which is no character.
    """
    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    check_characters(text)
    ids = ids_of(text)
    if after and ids and tokenizer.convert_ids_to_tokens(ids[0]).startswith("\u2581"):
        line, both = ids_of("\n"), ids_of("\n" + text)
        ids = both[len(line):] if both[:len(line)] == line else ids
    return torch.tensor(ids, dtype=torch.long, device="cpu")


def begin_text(tokenizer, ids: Tensor) -> Tensor:
    """ids [N] of a text, after the token that all texts of its model begin with, if there is one (DiffusionGemma)."""
    if not getattr(tokenizer, "begins_texts", False) or tokenizer.bos_token_id is None:
        return ids
    return torch.cat((torch.tensor([tokenizer.bos_token_id], device="cpu"), ids))


def check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text is no valid Unicode: half of a surrogate pair at character {error.start}; take it "
                        "out") from None


def encode_with_masks(tokenizer, text: str) -> Tensor:
    """As `encode`, except that the mask token's text is the mask token."""
    if tokenizer.mask_token is None:
        return encode(tokenizer, text)
    mask = torch.tensor([tokenizer.mask_token_id], device="cpu")
    parts = [encode(tokenizer, part, after=index > 0) for index, part in enumerate(text.split(tokenizer.mask_token))]
    return torch.cat([parts[0], *(ids for part in parts[1:] for ids in (mask, part))])


def fill_masks(tokenizer, text: str, ids: Tensor) -> str:
    """The text with what a model filled in for its masks. ids: [N], those of `encode_with_masks`, filled."""
    if tokenizer.mask_token is None:
        return text
    parts = re.split(f"((?:{re.escape(tokenizer.mask_token)})+)", text)
    place, filled = 0, []
    for index, part in enumerate(parts):
        count = len(part) // len(tokenizer.mask_token) if index % 2 else len(
            encode(tokenizer, part, after=index > 0))
        filled.append(decode_after(tokenizer, ids[:place], ids[place:place + count]) if index % 2 else part)
        place += count
    return "".join(filled)


def protect(tokenizer, value):
    """A message, or a list of them, in which the special tokens that its texts spell stay text through a chat template
    and `encode_rendered`."""
    if isinstance(value, dict):
        return {name: protect(tokenizer, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [protect(tokenizer, item) for item in value]
    if not isinstance(value, str):
        return value
    return _special(tokenizer).sub(lambda found: found[0][0] + _GUARD + found[0][1:], value.replace(_GUARD, _GUARD * 2))


def encode_rendered(tokenizer, text: str) -> Tensor:
    """int64 [N]: what a chat template made of protected messages. Its own special tokens are tokens."""
    check_characters(text)
    if _GUARD not in text:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long, device="cpu")
    parts, pieces = [], [None, *_special(tokenizer).split(text), None]
    for index, (before, piece, after) in enumerate(zip(pieces, pieces[1:], pieces[2:], strict=False)):
        if index % 2:
            parts.append(torch.tensor([tokenizer.convert_tokens_to_ids(piece)], device="cpu"))
            continue
        first, end = find_between(tokenizer, piece, before, after)
        if first < end:
            parts.append(encode(tokenizer, re.sub(f"{_GUARD}({_GUARD}?)", r"\1", piece[first:end])))
    return torch.cat(parts)


def find_between(tokenizer, text: str, before: str | None, after: str | None) -> tuple[int, int]:
    """Start and end of the text between two special tokens, without the blanks that these take with them."""
    tokens = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    first, end = 0, len(text)
    if before in tokens and tokens[before].rstrip:
        first = end - len(text.lstrip())
    if after in tokens and tokens[after].lstrip:
        end = max(first, len(text.rstrip()))
    return first, end


def _special(tokenizer) -> re.Pattern:
    """Finds special tokens, the longest where several begin; in a group, so that `split` keeps them."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(tokens | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def decode_after(tokenizer, before: Tensor, ids: Tensor) -> str:
    """The text of tokens ids [N], as it reads after the tokens before it (some tokenizers drop a leading blank)."""
    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode([*before.tolist(), *ids.tolist()])[len(decode(before.tolist())):]


def end_token_ids(tokenizer) -> list[int]:
    """The tokens that end a text: those that the folder names, or the tokenizer's own one."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return getattr(tokenizer, "end_token_ids", own)


def anchor_token_id(tokenizer) -> int:
    """The token before a text that is edited, so that tokens can be inserted at its beginning."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def cut_at_end(tokenizer, ids: Tensor) -> Tensor:
    """ids up to the first end-of-text token: a model packs documents, so what follows belongs to another one."""
    end = torch.isin(ids, torch.tensor(end_token_ids(tokenizer), dtype=ids.dtype, device=ids.device)).nonzero()
    return ids[:int(end[0])] if len(end) else ids


def check_vocabulary(tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer some of whose tokens the model has no row for.

    Raises: UserError naming both sizes, or the mask token, and the remedy.
    """
    if (tokenizer.mask_token_id or 0) >= vocab_size:
        raise UserError(f"the mask token {tokenizer.mask_token} has id {tokenizer.mask_token_id}, outside the model's "
                        f"vocabulary of {vocab_size}; use a tokenizer with a mask token below that, a model.vocab_size "
                        f"of at least {tokenizer.mask_token_id + 1}, or adapt the model, which gives it more rows: "
                        "dllm train --model.model_path=...")
    if len(tokenizer) > vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary is {vocab_size}; use the "
                        f"model's own tokenizer, or a model.vocab_size of at least {len(tokenizer)}")


def check_separator(tokenizer) -> None:
    """Refuse a tokenizer without an end-of-text token, which separates the documents of training data."""
    if tokenizer.eos_token_id is None:
        raise UserError("neither the tokenizer nor its folder names an end-of-text token, which separates documents; "
                        "set eos_token in its tokenizer_config.json")


def anchor(tokenizer, ids: Tensor) -> Tensor:
    """ids [N] of a text that edits continue; an empty one becomes the anchor alone."""
    if len(ids):
        return ids
    check_separator(tokenizer)
    return torch.tensor([anchor_token_id(tokenizer)], device="cpu")


def frame(tokenizer, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """What is around a text to edit [N] and [M], from the anchor to the end of text, as such texts are trained on."""
    check_separator(tokenizer)
    first, last = torch.tensor([[anchor_token_id(tokenizer)], [tokenizer.eos_token_id]], device="cpu")
    return torch.cat((first, before)), torch.cat((after, last))
