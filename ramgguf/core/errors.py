"""What can go wrong: every error that is the user's to fix derives from RamggufError."""

from ramgguf.core.escape import printable


class RamggufError(Exception):
    """An error the user can mend; its message names the thing, what was found and what to do.

    It quotes what files say of themselves, so it is made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class GGUFError(RamggufError):
    """A GGUF file is malformed, of an unsupported kind, or cannot be read or written."""


class HubError(RamggufError):
    """A model on the Hugging Face hub does not exist, or cannot be had."""


class CheckpointError(RamggufError):
    """A checkpoint or an adapter is malformed, unsupported, or cannot be converted."""


class FormatError(RamggufError):
    """A block format is unknown, or does not suit a tensor."""


class ImatrixError(RamggufError):
    """An importance matrix is malformed, or was made for another model."""


class BudgetError(RamggufError):
    """No plan fits the budget, or the budget cannot be understood.

    smallest is the bytes of the smallest plan, where that is what the budget is below.
    """

    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class PlanError(RamggufError):
    """A plan, measurement or sensitivity file is malformed or belongs to another model."""


class EngineError(RamggufError):
    """llama.cpp is missing, refused a model, or crashed."""


class ResultError(RamggufError):
    """Evaluation results are malformed, or were not measured alike and must not be compared."""
