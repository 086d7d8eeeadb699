"""Pictures of results, for a person who would rather look than read."""

from __future__ import annotations

import errno
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt

from simulation.config import SimulationConfig
from simulation.errors import ResultsError
from simulation.game import RoundResult
from simulation.report import histogram

BINS = 101


def draw_histogram(path: Path, result: RoundResult, config: SimulationConfig) -> None:
    """Draw how often each number was answered, the average and the winning number. Raises ResultsError."""
    scale = 10**config.decimals
    edges, counts = histogram(result.tally.units, result.tally.counts, config.max_value * scale, BINS)
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = (edges[1] - edges[0]) / scale
    axes.bar(edges[:-1] / scale, counts, width=width * 0.9, align="edge", color="#8fb3d9", label="answers")
    if result.average is not None and result.winning_number is not None:
        shift = 0.5 / scale if width * scale == 1 else 0.0  # a bar of one unit is drawn beside its number
        average = float(result.average / scale)
        axes.axvline(average + shift, color="#c1440e", linewidth=2, label=f"average {average:.{config.decimals + 3}f}")
        winning = float(result.winning_number / scale)
        axes.axvline(
            winning + shift,
            color="#222222",
            linestyle=":",
            linewidth=2,
            label=f"winning number {winning:.{config.decimals + 3}f}",
        )
    tally = result.tally
    axes.set_title(f"Round {result.round}: {tally.answered:,} of {tally.asked:,} participants answered")
    axes.set_xlabel(f"number, 0 to {config.max_value:,}")
    axes.set_ylabel("participants")
    axes.set_xlim(0, float(edges[-1]) / scale)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
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
