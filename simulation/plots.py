"""Pictures of results, for a person who would rather look than read."""

from __future__ import annotations

import errno
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from simulation.config import SimulationConfig
from simulation.errors import ResultsError
from simulation.game import RoundResult
from simulation.report import histogram

BINS = 101


def draw_histogram(path: Path, result: RoundResult, config: SimulationConfig) -> None:
    """Draw how often each number was answered, the average and the winning number. Raises ResultsError."""
    scale = 10**config.decimals
    edges, counts = histogram(result.tally.units, result.tally.counts, config.max_value * scale, BINS)
    borders = (edges - 0.5) / scale  # a unit reaches half a unit to either side of its number
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axes.bar(borders[:-1], counts, (borders[1] - borders[0]) * 0.9, align="edge", color="#8fb3d9", label="answers")
    if result.average is not None and result.winning_number is not None:
        digits = config.decimals + 3
        average, winning = float(result.average / scale), float(result.winning_number / scale)
        axes.axvline(average, color="#c1440e", linewidth=2, label=f"average {average:.{digits}f}")
        label = f"winning number {winning:.{digits}f}"
        axes.axvline(winning, color="#222222", linestyle=":", linewidth=2, label=label)
    tally = result.tally
    axes.set_title(f"Round {result.round}: {tally.answered:,} of {tally.asked:,} participants answered")
    axes.set_xlabel(f"number, 0 to {config.max_value:,}")
    axes.set_ylabel("participants")
    axes.set_xlim(float(borders[0]), max(float(borders[-1]), config.max_value + 0.5 / scale))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    draft = path.with_name(f".{path.name}.new")
    try:
        figure.savefig(draft, dpi=120, format="png")
        draft.replace(path)
    except OSError as error:
        reason = "no space left" if error.errno == errno.ENOSPC else error.strerror
        raise ResultsError(f"cannot write {path}: {reason or error}") from None
    finally:
        plt.close(figure)
        draft.unlink(missing_ok=True)
