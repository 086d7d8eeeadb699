"""What is in of a round before it is over, for those who look on: bounded, and cheap for a million participants."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import psutil

from simulation.game.answer_sheet import AnswerSheet
from simulation.game.tally import Units

BINS = 101  # at most


@dataclass(frozen=True)
class RoundSnapshot:
    """What is in of a round already, and the process that hosts it.

    Attributes:
        round: Which one; 0 before the first.
        counts: Answers in bins of equal width (see `bins_of`); empty where nobody counts here.
        failures: Failures by cause.
        cpu_s: The CPU time that the process has used.
        clock_s: When that was, by the process's own clock.
        memory_mb: Its resident memory.
        took_s: The CPU time that it took to find all this out.
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
        """How many have answered, or failed."""
        return sum(self.counts) + sum(self.failures.values())


def bins_of(numbers: int) -> tuple[int, int]:
    """How wide the bins are, in units, and how many there are of them, for so many different answers from 0 on."""
    width = -(-numbers // BINS)
    return width, -(-numbers // width)


def take_snapshot(number: int, sheets: Iterable[AnswerSheet], numbers: int) -> RoundSnapshot:
    """Glance at sheets of a round that may be filling meanwhile, where there are so many different answers."""
    began = time.thread_time()
    width, bins = bins_of(numbers)
    counts: Units | None = None
    failures: dict[str, int] = {}
    for sheet in sheets:
        answered, failed = sheet.so_far(width, bins)
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
