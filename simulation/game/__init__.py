"""What the file of a game imports: its base class, its words, and the declaration of its settings."""

from simulation.game.game import Game, Outcome, Rules, Units
from simulation.game.parameters import setting
from simulation.game.tally import Tally, closest

__all__ = ["Game", "Outcome", "Rules", "Tally", "Units", "closest", "setting"]
