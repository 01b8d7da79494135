"""Tokenizers: published ones, given a mask token where they lack one, and a byte-level BPE trained on the corpus."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from dllm.errors import UserError

MASK, END, PAD = "<|mask|>", "<|endoftext|>", "<|pad|>"


def load_tokenizer(path_or_hub_id: str | os.PathLike, mask_token_id: int | None = None):
    """The fast tokenizer of a local folder or hub repository, with a mask token.

    Args:
        mask_token_id: the id that the model's configuration names; used where the tokenizer itself names none. With
            neither, "<|mask|>" is added.
    Returns: a `transformers.PreTrainedTokenizerFast`.
    Raises: UserError if it cannot be loaded, or `mask_token_id` is none of its tokens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_hub_id))
    except Exception as error:  # missing, unreachable, truncated or of an unknown kind: many types, one meaning
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load a tokenizer from {path_or_hub_id} ({reason}); give a folder with tokenizer.json, "
                        "or a hub repository as owner/name") from error
    if tokenizer.mask_token is None and mask_token_id is not None and mask_token_id < len(tokenizer):
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_token_id)
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if mask_token_id not in (None, tokenizer.mask_token_id):
        raise UserError(f"the model's mask token is {mask_token_id}, that of the tokenizer {path_or_hub_id} is "
                        f"{tokenizer.mask_token_id} ({tokenizer.mask_token}); give the model's own tokenizer")
    return tokenizer


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


def encode(tokenizer, text: str) -> Tensor:
    """int64 [N], with nothing added: documents are trained on without a beginning-of-text token."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def decode_after(tokenizer, before: Tensor, ids: Tensor) -> str:
    """The text of tokens ids [N], as it reads after the tokens before it (some tokenizers drop a leading blank)."""
    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode([*before.tolist(), *ids.tolist()])[len(decode(before.tolist())):]


def cut_at_end(tokenizer, ids: Tensor) -> Tensor:
    """ids up to the first end-of-text token: a model packs documents, so what follows belongs to another one."""
    end = (ids == tokenizer.eos_token_id).nonzero()
    return ids[:int(end[0])] if len(end) else ids


def check_vocabulary(tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer some of whose tokens the model has no row for.

    Raises: UserError naming both sizes, or the mask token, and the remedy.
    """
    if tokenizer.mask_token_id >= vocab_size:
        raise UserError(f"the mask token {tokenizer.mask_token} has id {tokenizer.mask_token_id}, outside the model's "
                        f"vocabulary of {vocab_size}; use a tokenizer with a mask token below that, or a "
                        f"model.vocab_size of at least {tokenizer.mask_token_id + 1}")
    if len(tokenizer) > vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary is {vocab_size}; use the "
                        f"model's own tokenizer, or a model.vocab_size of at least {len(tokenizer)}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end-of-text token, which separates documents; set eos_token in its "
                        "tokenizer_config.json")
