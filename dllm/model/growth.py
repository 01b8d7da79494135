"""Growth of a loaded model: rows of embedding and head for added tokens, heads for edits, self-conditioning."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.errors import UserError
from dllm.model.transformer import Transformer

MULTIPLE = 64  # rows, because matrix units want it
NOISE = 0.02  # of a new row, as a share of the old rows' standard deviation


def rows_needed(tokenizer, vocab_size: int) -> int:
    """The rows that the tokenizer's added tokens need: `vocab_size` where they fit, else a multiple of 64.

    Only added tokens make a vocabulary grow. Where other tokens lie beyond it the tokenizer is another model's, and
    `vocab_size` stays as it is, for `check_vocabulary` to refuse.
    """
    beyond = {word: row for word, row in tokenizer.get_vocab().items() if row >= vocab_size}
    if not beyond or beyond.keys() - tokenizer.get_added_vocab().keys():
        return vocab_size
    return -(-(max(beyond.values()) + 1) // MULTIPLE) * MULTIPLE


def describe_growth(tokenizer, before: int, after: int) -> str:
    words = [word for word, row in tokenizer.get_added_vocab().items() if row >= before]
    return (f"the vocabulary grows from {before:,} to {after:,} rows, because the model has none for "
            f"{', '.join(words)}; model.mask_token can name a token that it has")


def grow(model: Transformer, vocab_size: int, seed: int) -> Transformer:
    """Give the embedding, and the head if it is not tied, new rows up to `vocab_size`, in place; returns the model.

    A new row is the mean of the old ones plus normal noise, so its logit is at first near the average one and the
    distribution over the old tokens hardly changes (Hewitt 2021). The same seed gives the same rows.
    """
    old = model.config.vocab_size
    if vocab_size == old:
        return model
    generator = torch.Generator().manual_seed(seed)
    for module in (model.embedding, model.lm_head, model.insert_head):
        if module is not None:
            module.weight = nn.Parameter(torch.cat((module.weight.detach(),
                                                    new_rows(module.weight, vocab_size - old, generator))))
    if model.head_bias is not None:
        model.lm_head.bias = nn.Parameter(F.pad(model.lm_head.bias.detach(), (0, vocab_size - old),
                                                value=float(model.lm_head.bias.detach().float().mean())))
    model.embedding.num_embeddings = vocab_size
    for head in filter(None, (model.lm_head, model.insert_head)):
        head.out_features = vocab_size
    model.config = replace(model.config, vocab_size=vocab_size)
    return model


def new_rows(matrix: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, D], in the dtype and on the device of the matrix [V, D]."""
    old = matrix.detach().float()
    noise = torch.randn(count, old.shape[1], generator=generator).to(old.device)
    return (old.mean(0) + NOISE * old.std(0) * noise).to(matrix.dtype)


@torch.no_grad()
def add_edit_heads(model: Transformer, kind: str) -> Transformer:
    """Give a model heads that insert, or that edit in all ways, in place; returns the model.

    The insertion head begins as a copy of the head: under shifted logits it is the autoregressive model's next token.
    The rates begin without regard to the text, at softplus(0) = 0.7 edits of each kind a position.
    """
    if model.head_bias is not None or model.config.logit_softcap is not None:
        raise UserError(f"the head of {model.config.family} has a bias or a soft cap, which heads for edits do not "
                        "have; choose another model, or an objective that fills masks")
    if model.insert_head is None:
        model.insert_head = nn.Linear(*reversed(model.head_weight.shape), bias=False).to(model.head_weight)
        model.insert_head.weight.copy_(model.head_weight)
        model.rate_head = nn.Linear(model.config.hidden_size, 3).to(model.head_weight)
        nn.init.zeros_(model.rate_head.weight)
        nn.init.zeros_(model.rate_head.bias)
    model.config = replace(model.config, edit_heads=kind)
    return model


def add_self_conditioning(model: Transformer) -> Transformer:
    """Let a model see its own predictions, in place; returns the model. At first they change nothing."""
    if model.self_condition is None:
        width = model.config.hidden_size
        model.self_condition = nn.Linear(width, width, bias=False).to(model.head_weight)
        nn.init.zeros_(model.self_condition.weight)
        model.config = replace(model.config, self_conditioning=True)
    return model
