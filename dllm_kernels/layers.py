"""Operations as layers: torch.nn.Modules without parameters, state or settings, as the Kernels Hub takes them.

    loss = MaskedLinearCrossEntropy()(hidden, lm_head.weight, targets, corrupted)

The backend is always the fastest that can run; the functions take more options and describe the shapes in full.
"""

from torch import Tensor, nn

from .attention import bidirectional_attention
from .masked_cross_entropy import linear_masked_cross_entropy
from .topk_unmask import Unmasked, topk_unmask


class MaskedLinearCrossEntropy(nn.Module):
    """`linear_masked_cross_entropy`: the loss of the corrupted positions, from hidden states and the head."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, bias: Tensor | None = None,
                weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss, fp32: a scalar, or [...] with the reduction "none".

        Args:
            hidden: [..., D]. weight: [V, D]. bias: [V]. targets: [...] int64. corrupted: [...] bool.
            weights: [...] fp32, a factor per position.
            reduction: "mean" (per corrupted position), "sum" or "none".
        Raises: ValueError as the function.
        """
        return linear_masked_cross_entropy(hidden, weight, targets, corrupted, bias=bias, weights=weights,
                                           reduction=reduction)


class TopKUnmask(nn.Module):
    """`topk_unmask`: fill the k masked positions of each row that the logits are surest of."""

    has_backward = False
    can_torch_compile = True

    def forward(self, logits: Tensor, tokens: Tensor, mask_token_id: int, k: Tensor | int, temperature: float = 0.0,
                threshold: float | None = None) -> Unmasked:
        """The tokens with those positions filled, and which positions they are.

        Args:
            logits: [B, L, V]. tokens: [B, L] int64. k: [B] int64, or an int.
            temperature: 0 takes the most likely tokens.
            threshold: fill every position whose probability is at least this, too.
        Raises: ValueError as the function.
        """
        return topk_unmask(logits, tokens, mask_token_id, k, temperature=temperature, threshold=threshold)


class BidirectionalAttention(nn.Module):
    """`bidirectional_attention`: every query sees every key, or those that the mask or the blocks leave."""

    has_backward = True
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None,
                block_length: int | None = None, scale: float | None = None) -> Tensor:
        """[B, Lq, Hq, E] in q's dtype.

        Args:
            q: [B, Lq, Hq, E]. k, v: [B, Lk, Hkv, E]. key_mask: [B, Lk] bool, True may be attended.
            block_length: query i sees key j iff j // block_length <= i // block_length; None is one block.
            scale: of the scores; None takes E ** -0.5.
        Raises: ValueError as the function.
        """
        return bidirectional_attention(q, k, v, key_mask=key_mask, block_length=block_length, scale=scale)
