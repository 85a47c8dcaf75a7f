"""What the steps of an effort have measured, kept beside the model for the next run and budget."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.errors import GGUFError, RamggufError
from ramgguf.core.files import free_bytes
from ramgguf.gguf.hub import beside
from ramgguf.gguf.identity import FileIdentity
from ramgguf.gguf.reader import GGUFFile
from ramgguf.quantize.schedule import N_CTX, Kept
from ramgguf.quants.imatrix import load_importance
from ramgguf.sensitivity import MassiveActivations, Sensitivity


@dataclass(frozen=True)
class StepCache:
    """Files named after the model's own data, and the tokens that matrices were made from."""

    folder: Path
    identity: str
    tokens: str

    @classmethod
    def of(cls, file: GGUFFile, model: Path, tokens: str) -> "StepCache":
        """Return the cache of the model in the file; the folder is made.

        Raises GGUFError where it cannot be written.
        """
        found = FileIdentity.of(file)
        text = f"{found.n_bytes} {found.header_sha256} {found.sample_sha256}"
        folder = beside(model, f"{model.name.removesuffix('.gguf')}.effort")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise GGUFError(f"{folder}: cannot be made: {e.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise GGUFError(f"{folder}: cannot be written")
        return cls(folder, hashlib.sha256(text.encode()).hexdigest()[:12], tokens)

    def kept(self) -> Kept:
        """Return what is there."""
        n = max(self._matrices(), default=0)
        return Kept(
            matrix=n,
            hessian=n > 0 and self.hessian(n).exists(),
            massive=self.massive() is not None,
            sensitivity=n > 0 and self.sensitivity(n) is not None,
            scales=n > 0 and self.scales(n).exists(),
            free_bytes=free_bytes(self.folder),
        )

    def partial(self, n_sequences: int) -> Path:
        """Return the folder of what is done of a matrix from so many sequences."""
        matrix = self.matrix(n_sequences)
        return matrix.with_name(f"{matrix.name}.partial")

    def begun(self, n_sequences: int) -> int:
        """Return of how many sequences a matrix is to be made: near n_sequences, those of one that
        a killed run has begun.
        """
        if self.matrix(n_sequences).exists():
            return n_sequences
        near = [n for n in self._matrices(".partial") if n_sequences <= 2 * n <= 3 * n_sequences]
        return max(near, default=n_sequences)

    def forget_begun(self) -> None:
        """Remove what killed runs had done of matrices that are not needed any more."""
        for path in self._matrices(".partial").values():
            shutil.rmtree(path, ignore_errors=True)

    def _matrices(self, suffix: str = "") -> dict[int, Path]:
        found = {}
        name = f"{self.tokens}-*x{N_CTX}-{self.identity}.imatrix.gguf{suffix}"
        for path in self.folder.glob(name):
            count = path.name.removeprefix(f"{self.tokens}-").partition("x")[0]
            if count.isdigit():
                found[int(count)] = path
        return found

    def matrix(self, n_sequences: int) -> Path:
        """Return the path of the matrix from so many sequences."""
        return self._of_tokens(n_sequences, "imatrix")

    def hessian(self, n_sequences: int) -> Path:
        """Return the path of the Hessians from so many sequences."""
        return self._of_tokens(n_sequences, "hessian")

    def scales(self, n_sequences: int) -> Path:
        """Return the path of the scales by the matrix from so many sequences."""
        return self._of_tokens(n_sequences, "scales")

    def _of_tokens(self, n_sequences: int, kind: str) -> Path:
        return self.folder / f"{self.tokens}-{n_sequences}x{N_CTX}-{self.identity}.{kind}.gguf"

    @property
    def sensitivity_path(self) -> Path:
        """The path of the sensitivities."""
        return self.folder / f"{self.identity}.sens.json"

    @property
    def massive_path(self) -> Path:
        """The path of the massive activations."""
        return self.folder / f"{self.identity}.massive.json"

    @property
    def swaps(self) -> Path:
        """What the journals of swaps are kept beside, and named after."""
        return self.folder / f"{self.identity}.swaps"

    @property
    def blocks(self) -> Path:
        """What error feedback has encoded, until the run ends."""
        return self.folder / f"{self.identity}.blocks.partial"

    @property
    def rounding(self) -> Path:
        """The file that is rounded layer by layer, until that is done."""
        return self.folder / f"{self.identity}.layers.partial.gguf"

    def sensitivity(self, n_sequences: int | None) -> Sensitivity | None:
        """Return those under the matrix of so many sequences (None: no matrix), if they are there.

        A file that cannot be read is as good as none.
        """
        path = self.sensitivity_path
        try:
            if not path.exists():
                return None
            found = Sensitivity.load(path)
            matrix = None if n_sequences is None else load_importance(self.matrix(n_sequences))
        except RamggufError:
            return None
        wanted = matrix.source.identity if matrix else None
        have = found.imatrix.identity if found.imatrix else None
        return found if wanted == have else None

    def massive(self) -> MassiveActivations | None:
        """Return the massive activations, if they are there and can be read."""
        try:
            return MassiveActivations.load(self.massive_path)
        except RamggufError:
            return None
