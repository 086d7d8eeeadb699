"""The role verify: ask each round of a saved run again, with the recorded announcements, and compare the answers."""

import secrets
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from simulation.cluster.preflight import check_cluster
from simulation.cluster.rounds import Simulation
from simulation.errors import Interrupted, RunAborted, SettingsError
from simulation.game.answer_sheet import Answers
from simulation.game.game import Game
from simulation.game.tally import RoundResult, announcement_of
from simulation.llm.prompts import KeptText
from simulation.provenance import with_copies
from simulation.results.answers_parquet import rows_by_round
from simulation.results.reader import SavedRun
from simulation.results.run_directory import WHOLE, results_errors
from simulation.rpc.endpoints import remote_run
from simulation.runs.console import ConsoleProgress
from simulation.runs.run_spec import RunSpec


class _Recorded:
    """The recorded answers of a run, as the memory of its participants. Nothing is written."""

    def __init__(self, saved: SavedRun) -> None:
        shape = len(saved.results), saved.config.participant_num
        self._values = np.full(shape, np.nan)
        with results_errors(f"read the answers in {saved.path}"):
            for number, rows in rows_by_round(saved.path / WHOLE):
                if number <= len(saved.results):
                    self._values[number - 1, rows["participant"].to_numpy()] = rows["value"].to_numpy()

    def values(self, first: int, count: int, rounds: int) -> NDArray[np.float64]:
        return self._values[:rounds, first : first + count]

    def units(self, number: int, scale: int) -> NDArray[np.int64]:
        """Return the answers of a round in units; -1 stands for no answer."""
        return np.rint(np.nan_to_num(self._values[number - 1] * scale, nan=-1)).astype(np.int64)

    def write_answers(self, result: RoundResult, answers: Iterator[Answers], game: Game) -> None:
        raise NotImplementedError("a saved run is not changed")

    def write_texts(self, round_number: int, texts: Iterator[list[KeptText]]) -> tuple[int, int]:
        raise NotImplementedError("a saved run is not changed")


def verify(spec: RunSpec, console: ConsoleProgress) -> int:
    """Ask all rounds again, and print how many answers are equal. Return 0 if all are, else 4.

    Only answers that the run recorded are compared. Raises SettingsError if the answers of its models had no seeds, or
    if the model servers do not repeat seeded answers, and ClusterError if servers are not ready.
    """
    saved = spec.saved
    assert saved is not None
    seeded = saved.config.uses_models
    if seeded and not saved.summary.get("repeatable"):
        problem = "not all its answers had seeds; ./start_vllm.sh --repeatable serves models for runs that repeat"
        raise SettingsError(f"--role verify {saved.path}: {problem}")
    if not any(result.tally.answered for result in saved.results):
        raise SettingsError(f"--role verify {saved.path}: holds no answers")
    _, repeatable = check_cluster(spec.config, spec.game)
    if not repeatable:
        raise SettingsError(f"--role verify {saved.path}: start the model servers with ./start_vllm.sh --repeatable")
    record = _Recorded(saved)
    prefix = remote_run(spec.run_id, secrets.token_hex(2))
    game = replace(spec.game, seeds_models=seeded)
    announced = tuple(announcement_of(each, game) for each in saved.results)
    simulation = Simulation(
        with_copies(spec.config, spec.copies), game, prefix, console, record, recorded=spec.recorded
    )
    equal = compared = 0
    with simulation:
        simulation.create()
        for number in range(1, saved.rounds_finished + 1):
            logger.info(f"round {number}: asking {spec.config.participant_num} participants again")
            now = np.concatenate([each.units for each in simulation.ask_again(number, announced[: number - 1])])
            if console.stop_signal is not None:
                raise Interrupted(console.stop_signal)
            before = record.units(number, game.scale)
            same, answered = int(((now == before) & (before >= 0)).sum()), int((before >= 0).sum())
            console.say([f"round {number}: {same:,} of {answered:,} answers are equal"])
            equal, compared = equal + same, compared + answered
    console.say([f"{equal:,} of {compared:,} answers are equal ({equal / max(compared, 1):.2%})"])
    return 0 if equal == compared else RunAborted.exit_status
