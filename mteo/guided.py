"""Which steps evaluate the pair that cfg needs. At the others the prompt is evaluated alone, one evaluation in place of two, and the table stands in for the
guidance."""
from collections.abc import Sequence

from .errors import MTEOError

ALL = "all"
Guided = str | tuple[int, ...]  # ALL, or numbers of steps from 1, rising


def read_guided(value, steps: int) -> Guided:
    """From "all", "none", a number of a step, several as a list or as text ("1 3"); MTEOError for anything else."""
    words = value.replace(",", " ").split() if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    if words == [ALL]:
        return ALL
    try:
        found = sorted({int(word) for word in words if word != "none"})
    except (TypeError, ValueError):
        found = [0]
    if not words and isinstance(value, str) or any(not 1 <= step <= steps for step in found):
        raise MTEOError(f'The guided steps are {value!r}: give "all", "none" or numbers of steps from 1 to {steps}, such as "1 3".')
    return ALL if len(found) == steps else tuple(found)


def alone_of(guided: Guided, rows: Sequence[int]) -> list[int]:
    """The calls, by the row of each from 0, that evaluate the prompt alone."""
    return [call for call, row in enumerate(rows) if guided != ALL and row + 1 not in guided]
