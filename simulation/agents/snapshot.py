"""Snapshots of a round in progress, for observers: of bounded size, and cheap for a million participants."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import psutil

from simulation.game.answer_sheet import AnswerSheet
from simulation.game.tally import Units

BINS = 101  # maximum


@dataclass(frozen=True)
class RoundSnapshot:
    """The answers of a round so far, and the resource use of the process that hosts it.

    Attributes:
        round: Number of the round; 0 before the first.
        counts: Number of answers in bins of equal width (see `bins_of`); empty without an answer sheet.
        failures: Number of failures by cause.
        cpu_s: CPU time that the process has used.
        clock_s: Monotonic clock of the process at that time.
        memory_mb: Resident memory of the process.
        took_s: CPU time that this snapshot took.
    """

    round: int
    counts: tuple[int, ...]
    failures: dict[str, int]
    cpu_s: float
    clock_s: float
    memory_mb: float
    took_s: float

    @property
    def done(self) -> int:
        """Return the number of participants that have answered or failed."""
        return sum(self.counts) + sum(self.failures.values())


def bins_of(numbers: int) -> tuple[int, int]:
    """Return the width of the bins in units, and their number, for `numbers` possible answers from 0 on."""
    width = -(-numbers // BINS)
    return width, -(-numbers // width)


def take_snapshot(number: int, sheets: Iterable[AnswerSheet], numbers: int) -> RoundSnapshot:
    """Summarize sheets of a round, which may be filling concurrently; `numbers` is the count of possible answers."""
    began = time.thread_time()
    width, bins = bins_of(numbers)
    counts: Units | None = None
    failures: dict[str, int] = {}
    for sheet in sheets:
        answered, failed = sheet.partial_histogram(width, bins)
        counts = answered if counts is None else counts + answered
        for cause, often in failed.items():
            failures[cause] = failures.get(cause, 0) + often
    memory_mb = psutil.Process().memory_info().rss / 2**20
    return RoundSnapshot(
        number,
        () if counts is None else tuple(np.asarray(counts).tolist()),
        failures,
        time.process_time(),
        time.monotonic(),
        round(memory_mb, 1),
        time.thread_time() - began,
    )
