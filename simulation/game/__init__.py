"""What the file of a game imports: its base class, its words, and the declaration of its settings."""

from simulation.game.game import Game, Outcome, Rules, Units, closest
from simulation.game.tally import Tally
from simulation.settings import setting

__all__ = ["Game", "Outcome", "Rules", "Tally", "Units", "closest", "setting"]
