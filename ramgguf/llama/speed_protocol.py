"""The messages between who measures the speed of formats and the child that runs the models."""

from typing import Literal

from ramgguf.core.documents import FrozenModel


class Drop(FrozenModel):
    """Free the model that was loaded last."""

    kind: Literal["drop"] = "drop"


class Dropped(FrozenModel):
    kind: Literal["dropped"] = "dropped"


class TimeTogether(FrozenModel):
    """Time all models that are loaded: each one once in every round, so that load affects all.

    A round is a prompt of n_prompt tokens and n_generated tokens after it.
    """

    kind: Literal["time_together"] = "time_together"
    n_prompt: int
    n_generated: int
    n_rounds: int


class Together(FrozenModel):
    """Seconds of each prompt, one a round, and of each generated token, for each model."""

    kind: Literal["together"] = "together"
    prompt: tuple[tuple[float, ...], ...]
    generation: tuple[tuple[float, ...], ...]
