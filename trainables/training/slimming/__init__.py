"""Penalties and a sparsifier at work in a training loop: in ours (`acting.py`), and in anybody's
(`slimming.py`); `what_acts.py` says what was asked for and does not happen."""

from slimfront.trainables.training.slimming.acting import Acting as Acting
from slimfront.trainables.training.slimming.acting import Asked as Asked
from slimfront.trainables.training.slimming.arguments import inner_optimizer as inner_optimizer
from slimfront.trainables.training.slimming.arguments import unwrapped as unwrapped
from slimfront.trainables.training.slimming.slimming import Slimming as Slimming
