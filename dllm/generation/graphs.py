"""Forward passes replayed from CUDA graphs: of a small model, launching the kernels takes longer than running them."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.model.cache import KeyValueCache
from dllm.model.layouts import Cached, Padded
from dllm.model.transformer import Transformer


class GraphedForward:
    """`model.hidden_states`, one graph for each number of rows, length, bucket of queries, and part of a cache.

    The wanted positions are filled up to a power of two, so that there are few graphs. A graph keeps its memory, and a
    cache is kept for the next canvas of its size; the first pass of a kind runs the model four times to make a graph.
    Not run on a GPU yet.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.recorded: dict[tuple, tuple] = {}
        self.caches: dict[tuple, KeyValueCache] = {}

    def cache_for(self, rows: int, capacity: int, block_length: int | None) -> KeyValueCache:
        """The cache of canvases of this size."""
        like = self.model.head_weight
        key = (rows, capacity, block_length, like.data_ptr())
        if key not in self.caches:
            self.caches[key] = KeyValueCache(self.model.config, rows, capacity, like, block_length)
        return self.caches[key]

    def __call__(self, tokens: Tensor, layout: Padded | Cached) -> Tensor:
        """As `Transformer.hidden_states`, of a layout with queries: tokens [B, L] -> [B, Q, D]."""
        cached = isinstance(layout, Cached)
        if cached and layout.rows is not None:  # some rows of a cache: others each time
            return self.model.hidden_states(tokens, layout)
        wanted, mask = layout.queries.shape[1], layout.key_mask
        queries = F.pad(layout.queries, (0, bucket_of(wanted, tokens.shape[1]) - wanted))
        part = (layout.cache.content.data_ptr(), layout.start, layout.several, layout.context) if cached else None
        key = (*tokens.shape, queries.shape[1], mask is None, part, self.model.head_weight.data_ptr())
        if key not in self.recorded:
            own = replace(layout, queries=queries.clone(), key_mask=None if mask is None else mask.clone())
            self.recorded[key] = self._record(tokens.clone(), own)
        its_tokens, own, output, replay = self.recorded[key]
        for place, x in ((its_tokens, tokens), (own.queries, queries), (own.key_mask, mask)):
            if x is not None:
                place.copy_(x)
        replay()
        return output[:, :wanted].clone()

    def _record(self, tokens: Tensor, layout: Padded | Cached):
        """The inputs' places, the output's, and what computes the one from the others."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is chosen, loaded or compiled at first use must be so before recording
            for _ in range(3):
                self.model.hidden_states(tokens, layout)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.model.hidden_states(tokens, layout)
        return tokens, layout, output, graph.replay


def bucket_of(count: int, most: int) -> int:
    """The smallest power of two that is at least `count`, but no more than `most`."""
    return min(1 << max(count - 1, 0).bit_length(), most)
