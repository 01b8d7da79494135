"""Validation during training: every measurement takes the same held-out rows with the same corruption."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from dllm.config.schema import Config, TrainGroup
from dllm.data import TrainingData
from dllm.errors import warn
from dllm.model.transformer import Transformer
from dllm.training.batches import MicroBatch, make_batches, share_positions
from dllm.training.distributed import Shared, World


class Validation(NamedTuple):
    loss: list[MicroBatch]  # for the loss of the objective
    bound: list[MicroBatch] | None  # for the likelihood bound; the same list if the objective is one; None: no masks
    tokens_per_byte: float  # in the held-out text


def draw_validation(data: TrainingData, config: Config, model: Transformer) -> Validation | None:
    """None if nothing is held out or, which it says, nothing of that is masked: a loss of 0 would mislead."""
    if data.held_out is None:
        return None

    def draw(settings: TrainGroup, by_ratio: bool) -> list[MicroBatch]:
        return make_batches(data.held_out, 0, range(rows), rows, settings, config.train.seed + 1, model,
                            by_ratio=by_ratio)

    rows = min(len(data.held_out), max(1, config.train.eval_tokens // config.data.max_seq_len))
    drawn = replace(config.train, masked_share=None)  # other times would bias the bound
    if drawn.objective != "canvas":
        drawn = replace(drawn, self_conditioning=0.0)
    loss = bound = draw(drawn, drawn.bounds_likelihood)
    if config.train.objective in ("edit", "canvas"):
        bound = None
    elif config.train.loss_weighting is not None:
        bound = draw(replace(drawn, loss_weighting=None), True)
    elif not config.train.bounds_likelihood and config.train.objective != "ar":
        bound = draw(replace(drawn, objective="elbo", path_term=False, mask_at_least_one=False,
                             corrupt_prompt=False, expand_token_id=None), True)
    pairs = config.data.data_type == "edits"  # which are measured too where nothing is to be inserted
    if not pairs and not all(sum(batch.scored for batch in batches) for batches in filter(None, (loss, bound))):
        warn(f"no held-out token is masked, of {sum(batch.tokens for batch in loss)}, so nothing is measured on them; "
             "raise data.validation_share")
        return None
    return Validation(loss, bound, data.held_out.num_tokens / max(data.held_out_bytes, 1))


@torch.no_grad()
def validate(shared: Shared, validation: Validation, world: World) -> dict[str, float]:
    """Measure the held-out rows.

    Returns: validation_loss of the objective; of "canvas" also validation_encoder_nll; validation_bound, that of "elbo"
        in nats per token, if the objective is no bound; validation_bits_per_byte of that bound; validation_nll_0_25 and
        so on, nats per token that was masked with a probability of 0 to 25%.
    """
    shared.eval()
    losses, encoder, by_ratio = sum_validation(shared, validation.loss, world)
    result = {"validation_loss": losses / max(sum(batch.normaliser for batch in validation.loss), 1)}
    if encoded := sum(batch.encoded for batch in validation.loss):
        result["validation_encoder_nll"] = encoder / encoded
        result["validation_loss"] += encoder / encoded
    if validation.bound is None:  # a bound of edits has a cut-off, and is no bound to compare with those of masks
        shared.train()
        return result
    if validation.bound is not validation.loss:
        losses, _, by_ratio = sum_validation(shared, validation.bound, world)
        result["validation_bound"] = losses / max(sum(batch.normaliser for batch in validation.bound), 1)
    bound = result.get("validation_bound", result["validation_loss"])
    result["validation_bits_per_byte"] = bound * validation.tokens_per_byte / math.log(2)
    for quarter, (nll, scored) in enumerate(zip(*by_ratio, strict=True)):
        if scored:
            result[f"validation_nll_{25 * quarter}_{25 * quarter + 25}"] = nll / scored
    shared.train()
    return result


def sum_validation(shared: Shared, batches: list[MicroBatch], world: World
                   ) -> tuple[float, float, list[list[float]]]:
    """The sums of the losses and of the encoder's, and [2, 4] sums of nll and counts by quarter of the masking
    probability.

    The micro-batches are dealt to the processes. All compute equally many, because with fsdp2 they exchange weights.
    """
    groups, group = world.size // world.sequence_size, world.rank // world.sequence_size
    mine = []
    for first in range(0, len(batches), groups):
        batch = batches[min(first + group, len(batches) - 1)]
        sums = shared(share_positions(batch, world.sequence_rank, world.sequence_size))
        by_ratio = [0.0] * 8 if sums.by_ratio is None else sums.by_ratio.flatten().tolist()
        if first + group < len(batches):
            mine.append([sums.loss.item(), 0.0 if sums.encoder is None else sums.encoder.item(), *by_ratio])
    loss, encoder, *by_ratio = map(math.fsum, zip(*(sums for part in world.gather(mine) for sums in part), strict=True))
    return loss, encoder, [by_ratio[:4], by_ratio[4:]]
