"""Partial histograms of a round in progress, which heartbeats carry while a dashboard is open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from simulation.game.answer_sheet import AnswerSheet
from simulation.rpc.messages import Progress

BINS = 101  # maximum


def bins_of(numbers: int) -> tuple[int, int]:
    """Return the width of the bins in units, and their number, for `numbers` possible answers from 0 on."""
    width = -(-numbers // BINS)
    return width, -(-numbers // width)


def with_histogram(progress: Progress, sheets: Iterable[AnswerSheet], numbers: int) -> Progress:
    """Add the answers so far on these sheets, which may be filling concurrently, in bins (see `bins_of`)."""
    width, bins = bins_of(numbers)
    counts = np.zeros(bins, np.int64)
    failures: Counter[str] = Counter()
    for sheet in sheets:
        answered, failed = sheet.partial_histogram(width, bins)
        counts += answered
        failures.update(failed)
    return replace(progress, counts=tuple(counts.tolist()), failures=dict(failures))
