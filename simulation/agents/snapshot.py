"""Partial histograms of a round in progress. Heartbeat replies contain them while a dashboard is open."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from simulation.game.answer_sheet import AnswerSheet
from simulation.rpc.messages import Progress

BINS = 101  # maximum number of bins


def bins_of(numbers: int) -> tuple[int, int]:
    """Return the width of a bin in units and the number of bins, for the possible answers 0 .. numbers-1."""
    width = -(-numbers // BINS)
    return width, -(-numbers // width)


def with_histogram(progress: Progress, sheets: Iterable[AnswerSheet], numbers: int) -> Progress:
    """Add a histogram of these sheets to the progress (see `bins_of`). The sheets may receive answers meanwhile."""
    width, bins = bins_of(numbers)
    counts = np.zeros(bins, np.int64)
    failures: Counter[str] = Counter()
    for sheet in sheets:
        answered, failed = sheet.partial_histogram(width, bins)
        counts += answered
        failures.update(failed)
    return replace(progress, counts=tuple(counts.tolist()), failures=dict(failures))
