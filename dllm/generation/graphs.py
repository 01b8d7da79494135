"""Forward passes replayed from CUDA graphs: of a small model, launching the kernels takes longer than running them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.cache import KeyValueCache
from dllm.model import DiffusionLM


class GraphedForward:
    """`model.hidden_states`, one graph for each number of rows, length, bucket of queries, and part of a cache.

    The wanted positions are filled up to a power of two, so that there are few graphs. A graph keeps its memory, and a
    cache is kept for the next canvas of its size; the first pass of a kind runs the model four times to make a graph.
    Not run on a GPU yet.
    """

    def __init__(self, model: DiffusionLM):
        self.model = model
        self.recorded: dict[tuple, tuple] = {}
        self.caches: dict[tuple, KeyValueCache] = {}

    def cache_for(self, rows: int, capacity: int, *, grows: bool) -> KeyValueCache:
        """The cache of canvases of this size."""
        like = self.model.head_weight
        key = (rows, capacity, grows, like.data_ptr())
        if key not in self.caches:
            self.caches[key] = KeyValueCache(self.model.config, rows, capacity, like=like, grows=grows)
        return self.caches[key]

    def __call__(self, tokens: Tensor, *, position_ids: Tensor, queries: Tensor, attention_mask: Tensor | None,
                 cache: KeyValueCache | None = None, block_length: int | None = None) -> Tensor:
        """As `DiffusionLM.hidden_states`: tokens and position_ids [B, L], queries [B, Q] -> [B, Q, D]."""
        settings = {} if cache is None else {"cache": cache, "block_length": block_length}
        if cache is not None and cache.rows is not None:  # some rows of a cache: others each time
            return self.model.hidden_states(tokens, position_ids=position_ids, queries=queries,
                                            attention_mask=attention_mask, **settings)
        wanted = queries.shape[1]
        queries = F.pad(queries, (0, bucket_of(wanted, tokens.shape[1]) - wanted))
        given = {"input_ids": tokens, "position_ids": position_ids, "queries": queries}
        if attention_mask is not None:
            given["attention_mask"] = attention_mask
        part = None if cache is None else (cache.content.data_ptr(), cache.start, block_length)
        key = (*tokens.shape, queries.shape[1], len(given), part, self.model.head_weight.data_ptr())
        if key not in self.recorded:
            self.recorded[key] = self._record({name: x.clone() for name, x in given.items()}, settings)
        inputs, output, replay = self.recorded[key]
        for name, x in given.items():
            inputs[name].copy_(x)
        replay()
        return output[:, :wanted].clone()

    def _record(self, inputs: dict[str, Tensor], settings: dict):
        """The inputs' places, the output's, and what computes the one from the others."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is chosen, loaded or compiled at first use must be so before recording
            for _ in range(3):
                self.model.hidden_states(**inputs, **settings)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.model.hidden_states(**inputs, **settings)
        return inputs, output, graph.replay


def bucket_of(count: int, most: int) -> int:
    """The smallest power of two that is at least `count`, but no more than `most`."""
    return min(1 << max(count - 1, 0).bit_length(), most)
