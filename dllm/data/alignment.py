"""The fewest edits that turn one text into another, as columns: a token before, and the token after in its place."""

from collections.abc import Mapping, Sequence

BLANK = -1  # where a column has no token
_PART = 1024  # tokens of the text after whose rows of the table are in memory at once


def align(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int]]:
    """Columns (a, b) of an alignment with the fewest that differ: (a, a) keeps, (a, b) substitutes, (a, BLANK) deletes,
    (BLANK, b) inserts. Of equally short ones, from the end backwards: keep or substitute, else delete, else insert.

    The table of distances is computed a row of bits at a time, in Python's whole numbers (Myers 1999,
    doi:10.1145/316542.316550; of whole texts, Hyyrö 2001). Every 1,024 rows one is kept, from which the rows in between
    are computed again on the way back, so that memory stays small.
    """
    places: dict[int, int] = {}
    for i, token in enumerate(before):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(before)) - 1
    starts = [(full, 0)]  # (ups, downs) before each part
    for first in range(0, len(after) - _PART, _PART):
        starts.append(_rows(places, full, after[first:first + _PART], *starts[-1])[-1][1:])

    columns, i = [], len(before)
    for part in reversed(range(len(starts))):
        tokens = after[part * _PART:(part + 1) * _PART]
        rows = _rows(places, full, tokens, *starts[part])
        while rows:
            token, (same, ups, _) = tokens[len(rows) - 1], rows[-1]
            if i and (before[i - 1] == token or not same >> (i - 1) & 1):
                columns.append((before[i - 1], token))
            elif i and ups >> (i - 1) & 1:
                columns.append((before[i - 1], BLANK))
            else:
                columns.append((BLANK, token))
            i -= columns[-1][0] != BLANK
            if columns[-1][1] != BLANK:
                rows.pop()
    columns.extend((before[k], BLANK) for k in reversed(range(i)))
    return columns[::-1]


def _rows(places: Mapping[int, int], full: int, tokens: Sequence[int], ups: int, downs: int
          ) -> list[tuple[int, int, int]]:
    """For each token of the text after, (same, ups, downs): bit i says whether the distance at i + 1 tokens before is
    that at one token less on both sides; one more, or one less, than at i tokens before."""
    rows = []
    for token in tokens:
        equal = places.get(token, 0)
        same = ((((equal & ups) + ups) ^ ups) | equal | downs) & full
        more = ((downs | full ^ (same | ups)) << 1 | 1) & full  # than without this token
        less = ((same & ups) << 1) & full
        ups, downs = less | full ^ (same | more), same & more
        rows.append((same, ups, downs))
    return rows
