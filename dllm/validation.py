"""What a model is measured on during training: the same held-out rows, corrupted the same way, at every measurement.

The sums of several processes add up, so each may measure some of the batches.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.batches import MicroBatch, make_batches
from dllm.config import Config
from dllm.data import Document, PackedDataset, tokenize
from dllm.loss import RATIO_BUCKETS, LossSums
from dllm.model import DiffusionLM


class Validation(NamedTuple):
    """Batches with the names of what they measure, in nats: the objective's loss, and apart from it the bound."""

    batches: list[tuple[str, MicroBatch]]
    bound: str  # the name of the bound on the negative log-likelihood per token
    bytes_per_token: float  # of the held-out text


def draw_validation(tokenizer, held_out: list[Document], config: Config, model: DiffusionLM) -> Validation | None:
    """Held-out rows of `eval_tokens` at most, corrupted for the objective, and for the bound if that is another."""
    if not held_out:
        return None
    dataset = PackedDataset(tokenize(tokenizer, held_out), config.data.max_seq_len, config.train.seed)
    rows = min(len(dataset), max(1, config.train.eval_tokens // config.data.max_seq_len))
    settings = {"validation_loss": config.train}
    if config.train.objective in ("mdm", "cart", "expansion"):
        settings["validation_bound"] = replace(config.train, objective="elbo", path_term=False, mask_at_least_one=False,
                                               corrupt_prompt=False, repr_align_wt=0.0, expand_token_id=None)
    batches = [(name, batch) for name, group in settings.items()
               for batch in make_batches(dataset, 0, range(rows), rows, group, config.train.seed + 1, model)]
    size = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in held_out)
    return Validation(batches, list(settings)[-1], size / len(dataset.tokens))


@torch.no_grad()
def measure_validation(run: Callable[[MicroBatch], LossSums], validation: Validation) -> Tensor:
    """The sums of the batches, [2, 2 + 2 * RATIO_BUCKETS] fp64 on the CPU, for `summarise`; they add up.

    Args:
        run: `dllm.batches.forward` of a model in evaluation mode.
    Returns: for the loss and for the bound: their sum, the normaliser, then per chance of being masked the sum of the
        negative log-likelihoods and the number of tokens scored.
    """
    sums = torch.zeros(2, 2 + 2 * RATIO_BUCKETS, dtype=torch.float64)
    for name, batch in validation.batches:
        got = run(batch)
        by_ratio = torch.zeros(2 * RATIO_BUCKETS) if got.by_ratio is None else got.by_ratio.flatten().cpu()
        means = torch.tensor([got.loss.item(), batch.normaliser], dtype=torch.float64)
        sums[int(name == "validation_bound")] += torch.cat((means, by_ratio))
    return sums


def summarise(sums: Tensor, validation: Validation) -> dict[str, float]:
    """Means of what `measure_validation` summed.

    validation_loss, and if it is not a bound itself validation_bound, in nats per token; validation_bits_per_byte, of
    the bound; validation_nll_00_25, validation_nll_25_50, ...: nats per masked token where the chance of being masked
    is from 0 to 0.25, from 0.25 to 0.5, ..., where any was scored.
    """
    names = ("validation_loss", "validation_bound")[:1 + (validation.bound == "validation_bound")]
    result = {name: float(row[0] / row[1].clamp(min=1)) for name, row in zip(names, sums, strict=False)}
    result["validation_bits_per_byte"] = result[validation.bound] / validation.bytes_per_token / math.log(2)
    nll, count = sums[len(names) - 1, 2:].view(2, RATIO_BUCKETS)
    for bucket in count.nonzero().flatten().tolist():
        low, high = (round(100 * edge / RATIO_BUCKETS) for edge in (bucket, bucket + 1))
        result[f"validation_nll_{low:02}_{high}"] = float(nll[bucket] / count[bucket])
    return result
