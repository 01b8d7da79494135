"""Hold documents out: a hash of a document's name decides, whatever other documents there are."""

import hashlib
from collections.abc import Sequence

from dllm.data.sources import Document


def split_documents(documents: Sequence[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """(training, held out). Each side gets a document if there are two, unless validation_share is 0."""
    held_out = choose_held_out([place_document(document.source) for document in documents], validation_share)
    return ([document for document, out in zip(documents, held_out, strict=True) if not out],
            [document for document, out in zip(documents, held_out, strict=True) if out])


def choose_held_out(places: Sequence[int], validation_share: float) -> list[bool]:
    """For the places of all documents of a corpus, whether each is held out, as in `split_documents`."""
    held_out = [place < validation_share * 2**64 for place in places]
    if validation_share > 0 and len(places) > 1:
        if not any(held_out):
            held_out[places.index(min(places))] = True
        if all(held_out):
            held_out[places.index(max(places))] = False
        return held_out
    return [False] * len(places)


def is_held_out(source: str, validation_share: float) -> bool:
    """Whether a document is held out, where the corpus as a whole is unknown."""
    return place_document(source) < validation_share * 2**64


def place_document(source: str) -> int:
    """A number in [0, 2**64) that a document's name decides."""
    return int.from_bytes(hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
