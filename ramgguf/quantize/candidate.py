"""What a step of an effort makes: a file, and the choices behind it."""

from dataclasses import dataclass
from pathlib import Path

from ramgguf.evaluate import HeldOutScore
from ramgguf.quantize.pipeline import Quantized
from ramgguf.quants.encoders import DEFAULT_ENCODER, EncoderName
from ramgguf.sensitivity import Sensitivity


@dataclass(frozen=True)
class Choice:
    """How a candidate is made."""

    encoder: EncoderName = DEFAULT_ENCODER
    imatrix: Path | None = None
    hessian: Path | None = None
    scales: Path | None = None
    sensitivity: Sensitivity | None = None
    pins: tuple[str, ...] = ()
    refine: int = 0


@dataclass
class Candidate:
    """A file in the scratch folder, what made it, and its score at the gate once it has one.

    decoded is the file that gates read instead, if there is one.
    """

    choice: Choice
    made: Quantized
    score: HeldOutScore | None = None
    decoded: Path | None = None

    @property
    def path(self) -> Path:
        return self.made.paths[0]

    def remove(self) -> None:
        """Remove its files."""
        for path in (self.path, self.decoded):
            if path is not None:
                path.unlink(missing_ok=True)
