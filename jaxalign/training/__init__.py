"""The training loop and what it needs; knows no method."""

from jaxalign.training.state import TrainState, init_state
from jaxalign.training.step import make_step

__all__ = ["TrainState", "init_state", "make_step"]
