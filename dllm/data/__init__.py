"""Text to rows of tokens: find it, hold some out, tokenise, cut, pack, shuffle, mix. `open_training_data` does it all.

Every row is a function of the corpus, the seed and its place in the run, whichever process reads it. So a killed run
continues on any number of processes. (A loader that saves the state of each worker, as torchdata's StatefulDataLoader,
continues only with the same number.)
"""

from dllm.data.corpus import Corpus, TrainingData, open_training_data, read_corpus
from dllm.data.packing import MixedDataset, Packed, PackedDataset, RowSource, pack
from dllm.data.sources import Document, read_documents
from dllm.data.splitting import split_documents
from dllm.data.streaming import StreamedRows
from dllm.data.tokens import tokenize

__all__ = ["Corpus", "Document", "MixedDataset", "Packed", "PackedDataset", "RowSource", "StreamedRows", "TrainingData",
           "open_training_data", "pack", "read_corpus", "read_documents", "split_documents", "tokenize"]
