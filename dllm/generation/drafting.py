"""Self-speculation: a model drafts by filling masks, and verifies from left to right, both in one forward pass.

A model with causal blocks and shifted logits sees a text as an autoregressive model does, and masks after it as a
diffusion model does. One pass reads the draft of the pass before, d[1] .. d[k], after the text, and behind each prefix
d[1] .. d[j], j = 0 .. k, a branch of k masks that no other branch sees (quadratic decoding, arXiv:2507.11851). The
hidden states at the draft say what the model writes there; those of the branch behind the accepted part draft the next
pass. So a pass commits the accepted tokens and one more, (k + 1)**2 positions give at most k + 1 tokens, and no pass is
spent on drafting. A model that verifies what it drafted itself: blockwise parallel decoding, arXiv:1811.03115.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm.errors import UserError
from dllm.generation.canvas import block_length_of
from dllm.generation.checks import find_ends, refuse
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.scorers import HeadScorer, score_by_head
from dllm.generation.steps import Update
from dllm.model.cache import KeyValueCache
from dllm.model.layouts import Branches
from dllm.model.transformer import Transformer


def plan_drafts(model: Transformer, config: MDMGenerationConfig) -> MDMGenerationConfig:
    """The config with a draft_length, and without blocks.

    Raises: UserError if the model does not write from left to right, or another setting needs it otherwise.
    """
    if not (model.config.causal_blocks and model.config.shift_logits) or config.block_causal is False:
        raise UserError("alg self_speculation needs a model whose tokens see nothing after themselves, with shifted "
                        "logits, as dllm train makes it of an autoregressive one by train.objective=block_diffusion "
                        "and train.causal_blocks=true; choose another alg")
    refuse({**{name: getattr(config, name) for name in ("cfg_scale", "constraint", "cuda_graphs", "sub_block_length")},
            "cache": config.cache != "none", "window_blocks": config.window_blocks > 1},
           "alg self_speculation, which writes one token after the other and keeps their keys and values")
    length = config.block_length or block_length_of(model) if config.draft_length is None else config.draft_length
    return replace(config, draft_length=length, block_length=None, blocks_from=None, block_causal=None)


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Where the rows of a pass stand; positions are counted in each row, without padding."""

    rows: Tensor  # [R] int64
    first: Tensor  # [R] int64, the first masked position
    end: Tensor  # [R] int64, the one after the masked positions that follow it without a gap
    branches: Tensor  # [R, k + 1, k, D], hidden states


class DraftScorer(HeadScorer):
    """Keeps the keys and values of what is written; each row is written at its own pace."""

    def __init__(self, model: Transformer, config: MDMGenerationConfig, mask_token_id: int, key_mask: Tensor | None,
                 prompt: Tensor):
        super().__init__(model, config, mask_token_id, key_mask, prompt)
        rows, length = prompt.shape
        real = torch.ones_like(prompt) if key_mask is None else key_mask
        self.columns = real.byte().argsort(dim=1, descending=True, stable=True)  # [B, L] of each position
        if len(without := (~prompt.gather(1, self.columns)[:, :1]).nonzero()):
            raise UserError("alg self_speculation writes after a text, and there is none before the masks of row "
                            f"{int(without[0, 0])}; give a prompt, such as the tokenizer's first token")
        self.cache = KeyValueCache(model.config, rows, length, model.head_weight)
        self.cache.content.zero_()  # attention multiplies what it does not see by 0
        self.finished = torch.zeros(rows, dtype=torch.long, device=prompt.device)  # positions that are kept
        self.drafts = torch.full((rows, config.draft_length), -1, device=prompt.device)  # from the first mask on
        ends = (config.eos_token_id or find_ends(model)) if config.stop_at_eos else ()
        self.ends = torch.tensor([*ends], device=prompt.device)  # a row is done after one
        self.words = torch.ones(1, model.config.vocab_size, dtype=torch.bool, device=prompt.device)
        self.words[:, mask_token_id] = False

    def verify(self) -> tuple[Update, Tensor]:
        """The token that the model writes at each place of the draft and after it, -1 elsewhere; and the draft [B, L],
        -1 where there is none."""
        rows = self.step.working.nonzero().squeeze(1).to(self.columns.device)
        columns, drafts = self.columns[rows], self.drafts[rows]
        masked = self.step.masked[rows].gather(1, columns)
        place = torch.arange(masked.shape[1], device=rows.device)
        first = masked.int().argmax(1)
        end = torch.where(masked | (place < first.unsqueeze(1)), len(place), place).amin(1)
        hidden = self._read_draft(rows, self.step.tokens[rows].gather(1, columns), first, drafts)
        count = drafts.shape[1] + 1
        self.window = Window(rows, first, end, hidden[:, count:].unflatten(1, (count, count - 1)))
        tokens, confidence = self._score(hidden[:, :count], first)
        over = torch.isin(tokens, self.ends)
        tokens = tokens.masked_fill(over.cumsum(1) > over, -1)
        nothing = torch.full_like(self.step.tokens, -1)
        return Update(self._place(nothing, tokens), self._place(None, confidence)), self._place(nothing, drafts)

    def draft(self, taken: Tensor) -> None:
        """Draft what follows the first `taken` [B] of the tokens that `verify` gave."""
        rows, first = self.window.rows, self.window.first
        accepted = taken[rows] - 1  # of the draft; the last token taken is not read yet
        self.finished[rows] = first + accepted
        hidden = self.window.branches[torch.arange(len(rows), device=rows.device), accepted]
        self.drafts[rows] = self._score(hidden, first + taken[rows])[0]

    def _read_draft(self, rows: Tensor, tokens: Tensor, first: Tensor, drafts: Tensor) -> Tensor:
        """Hidden states [R, (k + 1)**2, D]: of the last token of the text and the drafts [R, k] after it, then of the
        branches; tokens [R, L] is the canvas without padding."""
        count, most, device = drafts.shape[1], tokens.shape[1], rows.device
        # Rows of which all but the last few tokens are kept are read along from where the others begin.
        behind, last = torch.stack((first - self.finished[rows], first)).amax(1).tolist()
        text = (first.unsqueeze(1) + torch.arange(-behind, count, device=device)).clamp(min=0)
        accepted, masks = torch.arange(count + 1, device=device).repeat_interleave(count), torch.arange(
            count, device=device).repeat(count + 1)
        places = torch.cat((text, first.unsqueeze(1) + accepted + masks), 1).clamp(max=most - 1)
        ids = tokens.gather(1, places)
        ids[:, behind:behind + count] = drafts.clamp(min=0)
        ids[:, behind + count:] = self.mask_token_id
        seen = min(last + count, most)
        reach = torch.cat((text, first.unsqueeze(1) + accepted - 1), 1).unsqueeze(-1)
        of_cache = torch.arange(seen, device=device) <= reach
        own = (accepted == accepted.unsqueeze(1)) & (masks <= masks.unsqueeze(1))
        own = torch.cat((own.new_zeros(behind + count, len(masks)), own)).expand(len(rows), -1, -1)
        queries = torch.arange(behind - 1, places.shape[1], device=device).expand(len(rows), -1)
        self.forwards, self.row_forwards = self.forwards + 1, self.row_forwards + len(rows)
        return self.forward(ids, Branches(self.cache, rows=rows, queries=queries, places=places, kept=behind + count,
                                          mask=torch.cat((of_cache, own), -1)))

    def _score(self, hidden: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and confidences [R, n] of the positions from `first` [R] on, by hidden [R, n, D]; -1 and -inf where
        these are not to be filled."""
        places = first.unsqueeze(1) + torch.arange(hidden.shape[1], device=first.device)
        valid = (places < self.window.end.unsqueeze(1)).flatten().nonzero().squeeze(1)
        uniform = None
        if self.step.uniform is not None:
            rows = self.window.rows
            columns = self.columns[rows].gather(1, places.clamp(max=self.columns.shape[1] - 1))
            uniform = self.step.uniform[rows.unsqueeze(1), columns].flatten(0, 1)[valid]
        scores = score_by_head(self.model, hidden, valid, confidence="prob", generator=uniform,
                               allowed=self.words.expand(len(valid), -1), **self.sampling)
        tokens = torch.full(places.shape, -1, device=first.device)
        confidence = torch.full(places.shape, -torch.inf, dtype=torch.float32, device=first.device)
        return (tokens.flatten().index_copy(0, valid, scores.token).view_as(places),
                confidence.flatten().index_copy(0, valid, scores.confidence).view_as(places))

    def _place(self, onto: Tensor | None, values: Tensor) -> Tensor:
        """A copy of `onto` [B, L] (None: all -inf) with values [R, n] from each row's first mask on."""
        rows, first = self.window.rows, self.window.first
        if onto is None:
            onto = torch.full(self.columns.shape, -torch.inf, dtype=torch.float32, device=rows.device)
        places = first.unsqueeze(1) + torch.arange(values.shape[1], device=rows.device)
        inside = places < self.window.end.unsqueeze(1)
        columns = self.columns[rows].gather(1, places.clamp(max=onto.shape[1] - 1))
        onto = onto.clone()
        onto[rows.unsqueeze(1).expand_as(places)[inside], columns[inside]] = values[inside]
        return onto
