"""Forward passes replayed from CUDA graphs: of a small model, launching the kernels takes longer than running them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.model import DiffusionLM


class GraphedForward:
    """`model.hidden_states` of whole canvases, one graph for each number of rows, length, and bucket of queries.

    The wanted positions are filled up to a power of two, so that there are few graphs. A graph keeps its memory; the
    first pass of a kind runs the model four times to make one. Not run on a GPU yet.
    """

    def __init__(self, model: DiffusionLM):
        self.model = model
        self.recorded: dict[tuple, tuple] = {}

    def __call__(self, tokens: Tensor, *, position_ids: Tensor, queries: Tensor,
                 attention_mask: Tensor | None) -> Tensor:
        """As `DiffusionLM.hidden_states`: tokens and position_ids [B, L], queries [B, Q] -> [B, Q, D]."""
        wanted = queries.shape[1]
        queries = F.pad(queries, (0, bucket_of(wanted, tokens.shape[1]) - wanted))
        given = [x for x in (tokens, position_ids, queries, attention_mask) if x is not None]
        key = (*tokens.shape, queries.shape[1], len(given), self.model.head_weight.data_ptr())
        if key not in self.recorded:
            self.recorded[key] = self._record([x.clone() for x in given])
        inputs, output, replay = self.recorded[key]
        for place, x in zip(inputs, given, strict=True):
            place.copy_(x)
        replay()
        return output[:, :wanted].clone()

    def _record(self, inputs: list[Tensor]):
        """The inputs' places, the output's, and what computes the one from the others."""
        def run() -> Tensor:
            tokens, position_ids, queries, *mask = inputs
            return self.model.hidden_states(tokens, position_ids=position_ids, queries=queries,
                                            attention_mask=mask[0] if mask else None)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is chosen, loaded or compiled at first use must be so before recording
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        return inputs, output, graph.replay


def bucket_of(count: int, most: int) -> int:
    """The smallest power of two that is at least `count`, but no more than `most`."""
    return min(1 << max(count - 1, 0).bit_length(), most)
