"""Which documents are held out: a hash of a document's name decides, so it stays when others come or go."""

import hashlib
from collections.abc import Sequence

from dllm.data.sources import Document


def split_documents(documents: Sequence[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """(training, held out). Of two documents or more at least one is on either side, unless validation_share is 0."""
    held_out = choose_held_out([place_document(document.source) for document in documents], validation_share)
    return ([document for document, out in zip(documents, held_out, strict=True) if not out],
            [document for document, out in zip(documents, held_out, strict=True) if out])


def choose_held_out(places: Sequence[int], validation_share: float) -> list[bool]:
    """Which of all the documents of a corpus, whose places these are, are held out; as `split_documents`."""
    held_out = [place < validation_share * 2**64 for place in places]
    if validation_share > 0 and len(places) > 1:
        if not any(held_out):
            held_out[places.index(min(places))] = True
        if all(held_out):
            held_out[places.index(max(places))] = False
        return held_out
    return [False] * len(places)


def is_held_out(source: str, validation_share: float) -> bool:
    """Of a document whose corpus is not known as a whole."""
    return place_document(source) < validation_share * 2**64


def place_document(source: str) -> int:
    """A number in [0, 2**64) that a document's name decides."""
    return int.from_bytes(hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
