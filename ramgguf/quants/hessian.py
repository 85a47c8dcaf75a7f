"""Hessians of layers' outputs: XᵀX of what each weight is multiplied with, in a file of their own.

GGUF with general.type `hessian`: OWNER.gram, F32, for every input; which weights have it stands in
the metadata, since q, k and v, or gate and up, share theirs.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import ImatrixError
from ramgguf.gguf.architecture import sharers
from ramgguf.gguf.arrays import ArrayFile, Keys
from ramgguf.gguf.header import string, u32
from ramgguf.gguf.reader import GGUFFile, open_gguf

_GRAM = ".gram"
_KEPT = 4  # Hessians in memory: threads work on neighbouring tensors
MODEL_SAMPLE_KEY = "ramgguf.model_sample_sha256"  # of matrices, too
STAND_IN_KEY = "ramgguf.stand_in"  # of matrices, too
_WEIGHTS, _OWNERS, _N_TOKENS = "hessian.weights", "hessian.owners", "hessian.token_count"

UNIT = 256  # columns that the kernels round at a time
_MIRRORED = 256  # rows at a time: they stay in the cache
_ASYMMETRY = 1e-4  # of the largest element: what rounding leaves
DAMPING = 0.01  # of the mean of H's diagonal: that of the paper's code

Floats = NDArray[np.float32]


def add_grams(pairs: Iterable[tuple[Floats, Floats]], threads: int) -> None:
    """Add XᵀX of rows x (n_rows, n) to the entries of gram (n, n) on and above its diagonal.

    pairs are (x, gram), both contiguous; each product takes all threads.
    """
    from scipy.linalg.blas import ssyrk
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads, user_api="blas"):
        for x, gram in pairs:
            n_rows, n = x.shape
            if gram.shape != (n, n) or not (x.flags.c_contiguous and gram.flags.c_contiguous):
                raise ValueError(f"rows {x.shape} do not suit an XᵀX of shape {gram.shape}")
            if n_rows:
                # Fortran's order makes of X its transpose, and of the upper half the lower one.
                ssyrk(1.0, x.T, beta=1.0, c=gram.T, lower=1, overwrite_c=1)


def mirror(gram: Floats) -> None:
    """Copy what is above the diagonal of gram (n, n) below it."""
    for start in range(0, len(gram), _MIRRORED):
        stop = start + _MIRRORED
        gram[start:stop, :start] = gram[:start, start:stop].T
        block = np.triu(gram[start:stop, start:stop])
        gram[start:stop, start:stop] = block + np.triu(block, 1).T


def _asymmetry(gram: Floats) -> float:
    """Return the largest difference between entries that should be equal."""
    found = 0.0
    for start in range(0, len(gram), _MIRRORED):
        stop = start + _MIRRORED
        found = max(found, np.abs(gram[start:stop, :stop] - gram[:stop, start:stop].T).max())
    return found


@dataclass(frozen=True)
class Hessian:
    """What error feedback needs of a weight's inputs.

    mean is XᵀX over the number of inputs, (n, n); root is G, upper triangular, with
    mean + diag(damping) = GGᵀ.
    """

    mean: Floats
    root: Floats
    damping: Floats

    @staticmethod
    def of(
        gram: Floats, n_tokens: int, damping: float = DAMPING, scales: Floats | None = None
    ) -> "Hessian":
        """Return it for XᵀX over n_tokens inputs; inputs that never were active count as others.

        With scales (n,), it is that of the inputs divided by them; the damping is that of the
        inputs themselves, so that scales, which make inputs more alike, do not take it away.
        Raises ValueError where XᵀX plus damping is not positive definite, which no inputs make.
        """
        from scipy.linalg import LinAlgError, cholesky

        n = len(gram)
        mean = gram / np.float32(n_tokens)
        diagonal = mean.diagonal().astype(np.float64)
        typical = diagonal.mean() if diagonal.any() else 1.0
        added = np.where(diagonal > 0, 0.0, typical) + damping * typical
        if scales is not None:
            mean /= scales
            mean /= scales[:, None]
            divisor = scales.astype(np.float64) ** 2
            diagonal /= divisor
            added /= divisor
        # With the order of H reversed, H = TᵀT for an upper T; G is T reversed and transposed.
        # Arrays in Fortran's order are their transposes in C's: both are flat reversals.
        reversed_ = np.empty((n, n))
        reversed_.ravel()[:] = mean.ravel()[::-1]
        np.fill_diagonal(reversed_, (diagonal + added)[::-1])
        try:
            upper = cholesky(reversed_.T, lower=False, overwrite_a=True, check_finite=False)
        except LinAlgError:
            raise ValueError("the Hessian is not positive definite") from None
        root = np.empty((n, n), np.float32)
        root.ravel()[:] = upper.ravel(order="F")[::-1]
        return Hessian(mean, root, added.astype(np.float32))

    @cached_property
    def units(self) -> Sequence[Floats]:
        """The diagonal blocks of U = G⁻¹, H⁻¹ = UᵀU, by units of 256 columns; the last one is the
        identity beyond the columns. Each (256, 256).
        """
        from scipy.linalg.lapack import dtrtri

        found = []
        for start in range(0, len(self.root), UNIT):
            block = self.root[start : start + UNIT, start : start + UNIT]
            # In Fortran's order the block is its transpose, which is lower triangular.
            inverse, _ = dtrtri(block.astype(np.float64).T, lower=1)
            unit = np.eye(UNIT, dtype=np.float32)
            unit[: len(block), : len(block)] = inverse.T
            found.append(unit)
        return found

    @cached_property
    def damped(self) -> Floats:
        """mean + diag(damping), (n, n)."""
        found = self.mean.copy()
        np.fill_diagonal(found, found.diagonal() + self.damping)
        return found

    def error(self, difference: Floats) -> float:
        """Return Σ eHeᵀ over the rows e of a difference: that of the output, per input."""
        return float(self.errors(difference).sum())

    def errors(self, difference: Floats) -> NDArray[np.float64]:
        """Return eHeᵀ of each row e of a difference."""
        product = difference @ self.mean
        found: NDArray[np.float64] = np.einsum("ij,ij->i", product, difference, dtype=np.float64)
        return found

    def damped_errors(self, difference: Floats) -> NDArray[np.float64]:
        """Return eHeᵀ of each row e of a difference, for the damped H, from half of the products
        that the square H takes.
        """
        found = np.zeros(len(difference))
        for start in range(0, len(self.root), _MIRRORED):
            stop = start + _MIRRORED
            part = difference[:, :stop] @ self.root[:stop, start:stop]
            found += np.einsum("ij,ij->i", part, part, dtype=np.float64)
        return found


@dataclass(frozen=True)
class Hessians:
    """An open file of Hessians; owners maps a weight's name to the one its input is kept under.

    model_sample is the sample_sha256 of the model that they were made from, where the file says.
    divided_by, of a weight's name, says what its inputs are divided by once they are factored.
    """

    path: Path
    owners: Mapping[str, str]
    n_tokens: int
    model_sample: str | None = None
    divided_by: Callable[[str], Floats | None] = lambda _: None
    # Made at once, not at their first use: several threads use them first.
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )
    _recent: OrderedDict[tuple[str, int], Hessian] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )
    _making: dict[tuple[str, int], threading.Lock] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def _file(self) -> GGUFFile:
        return open_gguf(self.path)

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def factored(self, name: str, n_columns: int) -> Hessian:
        """Return what error feedback needs of the weight's inputs; the last few are kept."""
        # A file may say that weights of other columns have the same input: get refuses that.
        owner = self.owner(name) or name
        key = owner, n_columns
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:  # one thread makes it, while others make other ones
            with self._lock:
                found = self._recent.get(key)
            if found is None:
                found = self._factored(name, owner, n_columns)
            with self._lock:
                self._recent[key] = found
                self._recent.move_to_end(key)
                while len(self._recent) > _KEPT:
                    self._recent.popitem(last=False)
            return found

    def _factored(self, name: str, owner: str, n_columns: int) -> Hessian:
        gram = self.get(name, n_columns)
        assert gram is not None  # there is an owner
        try:
            return Hessian.of(gram, self.n_tokens, scales=self.divided_by(name))
        except ValueError as e:
            raise ImatrixError(
                f"{self.path}: {owner}{_GRAM}: {e}; make the file again with "
                "`ramgguf calibrate --hessian`"
            ) from None

    def owner(self, name: str) -> str | None:
        """Return the weight under which the input of this one is kept; None where it is not.

        A weight without an entry has that of one that reads the same activations.
        """
        names = (name, *sharers(name))
        return next((self.owners[n] for n in names if n in self.owners), None)

    def get(self, name: str, n_columns: int) -> NDArray[np.float32] | None:
        """Return XᵀX (n_columns, n_columns) of the weight's input; None where there is none.

        Raises ImatrixError when it is for other columns or not finite.
        """
        owner = self.owner(name)
        if owner is None:
            return None
        with self._lock:
            file = self._file
        tensor = file.tensor(owner + _GRAM)
        if tensor.shape != (n_columns, n_columns) or tensor.type_name != "F32":
            raise ImatrixError(
                f"{self.path}: {owner}{_GRAM} is {tensor.type_name} {tensor.shape}, but {name} "
                f"has {n_columns} columns; was it made with another model?"
            )
        gram = file.read_rows(tensor, 0, n_columns).view("<f4").astype(np.float32)
        if not np.isfinite(gram).all():
            raise ImatrixError(f"{self.path}: {owner}{_GRAM} is NaN or infinite")
        if _asymmetry(gram) > _ASYMMETRY * max(gram.max(), -gram.min()):
            raise ImatrixError(f"{self.path}: {owner}{_GRAM} is not symmetric, as XᵀX is")
        return gram

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def load_hessians(path: Path) -> Hessians:
    """Return the Hessians of the file. Raises ImatrixError or GGUFError when it holds none."""
    import scipy.linalg  # noqa: F401  # its threads are limited only once it is there

    with open_gguf(path) as file:
        kind = file.metadata.string("general.type")
        if kind != "hessian":
            raise ImatrixError(f"{path}: general.type is {kind!r}, expected 'hessian'")
        weights, owners = file.metadata.strings(_WEIGHTS), file.metadata.strings(_OWNERS)
        n_tokens = file.metadata.integer(_N_TOKENS)
        sample = file.metadata.string(MODEL_SAMPLE_KEY)
        names = {t.name for t in file.tensors}
    if weights is None or owners is None or n_tokens is None or n_tokens <= 0:
        raise ImatrixError(f"{path}: the metadata do not say which weights have which input")
    missing = [o for o in owners if o + _GRAM not in names]
    if len(weights) != len(owners) or missing:
        raise ImatrixError(f"{path}: {missing[:1]} is missing; was the file cut short?")
    return Hessians(path, dict(zip(weights, owners, strict=True)), n_tokens, sample)


def new_hessians(
    path: Path,
    owners: Mapping[str, str],
    sizes: Mapping[str, int],
    n_tokens: int,
    *,
    model_sample: str | None = None,
    stand_in: str | None = None,
    force: bool,
) -> ArrayFile:
    """Return a new file with room for the gram of every owner; sizes are the owners' columns.

    model_sample is the sample_sha256 of the model, to which they are then bound; stand_in the
    format of the stand-in that read the tokens.
    """
    keys: Keys = {
        "general.type": string("hessian"),
        _WEIGHTS: tuple(owners),
        _OWNERS: tuple(owners.values()),
        _N_TOKENS: u32(n_tokens),
        **({} if model_sample is None else {MODEL_SAMPLE_KEY: string(model_sample)}),
        **({} if stand_in is None else {STAND_IN_KEY: string(stand_in)}),
    }
    shapes = {owner + _GRAM: (n, n) for owner, n in sizes.items()}
    return ArrayFile(path, keys, shapes, force=force, error=ImatrixError)


def gram_name(owner: str) -> str:
    """Return the name under which an owner's gram is written."""
    return owner + _GRAM


def groups(sizes: Mapping[str, int], max_bytes: int) -> Sequence[tuple[str, ...]]:
    """Return the owners in groups whose grams take at most max_bytes together (or one each)."""
    found: list[list[str]] = []
    used = max_bytes
    for owner, n in sizes.items():
        n_bytes = 4 * n * n
        if used + n_bytes > max_bytes or not found:
            found.append([])
            used = 0
        found[-1].append(owner)
        used += n_bytes
    return [tuple(group) for group in found]
