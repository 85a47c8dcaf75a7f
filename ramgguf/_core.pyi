"""Types of the native core."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

# --- kernels ---
class BlockFormat:
    @property
    def name(self) -> str: ...
    @property
    def type_id(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def bpw(self) -> float: ...
    @property
    def encodable(self) -> bool: ...

class FormatError_:  # noqa: N801 (errors.FormatError is the exception)
    @property
    def format(self) -> str: ...
    @property
    def sum_squared_error(self) -> float: ...
    @property
    def weighted_squared_error(self) -> float: ...
    @property
    def max_error(self) -> float: ...
    @property
    def scale_overflow(self) -> bool: ...

class RowStats:
    @property
    def n_weights(self) -> int: ...
    @property
    def sum(self) -> float: ...
    @property
    def sum_squares(self) -> float: ...
    @property
    def sum_cubes(self) -> float: ...
    @property
    def sum_fourths(self) -> float: ...
    @property
    def max_abs(self) -> float: ...
    @property
    def weighted_sum_squares(self) -> float: ...
    @property
    def first_nonfinite(self) -> int: ...
    @property
    def errors(self) -> list[FormatError_]: ...
    def error_rows(self) -> list[tuple[str, float, float, float, bool]]: ...
    @staticmethod
    def joined(
        parts: list[RowStats], sum_squares: float, errors: list[float], formats: list[str]
    ) -> RowStats: ...
    @staticmethod
    def merged(parts: list[RowStats]) -> RowStats: ...

def formats() -> list[BlockFormat]: ...
def encode(
    dst: str,
    src_type: str,
    src: NDArray[np.uint8],
    out: NDArray[np.uint8],
    *,
    encoder: str = "rtn",
    importance: NDArray[np.float32] | None = None,
) -> None: ...
def encode_many(
    jobs: Sequence[
        tuple[str, str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32] | None]
    ],
    *,
    encoder: str = "rtn",
) -> None: ...
def decode(src_type: str, src: NDArray[np.uint8], out: NDArray[np.float32]) -> None: ...
def measure(
    formats: list[str],
    src_type: str,
    src: NDArray[np.uint8],
    *,
    encoder: str = "rtn",
    importance: NDArray[np.float32] | None = None,
) -> RowStats: ...
def measure_many(
    jobs: Sequence[tuple[Sequence[str], str, NDArray[np.uint8], NDArray[np.float32] | None]],
    *,
    encoder: str = "rtn",
) -> list[RowStats]: ...
def compare(
    type_a: str,
    a: NDArray[np.uint8],
    type_b: str,
    b: NDArray[np.uint8],
    *,
    importance: NDArray[np.float32] | None = None,
) -> RowStats: ...
def compare_many(
    jobs: Sequence[
        tuple[str, NDArray[np.uint8], str, NDArray[np.uint8], NDArray[np.float32] | None]
    ],
) -> list[RowStats]: ...

compiler: str

def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...

# --- gguf ---
class HeaderError(ValueError): ...

class Header:
    @property
    def version(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    @property
    def info_offset(self) -> int: ...
    @property
    def info_end(self) -> int: ...
    @property
    def data_offset(self) -> int: ...
    @property
    def keys(self) -> list[tuple[str, int, int, int, int, int, int]]:
        """Key, value type, item type, number of items; begin of record and value, end."""
    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], int, int, int]]:
        """Name, shape in ggml's order, type, absolute offset, bytes."""

def scan_header(
    buffer: bytes | bytearray | memoryview, n_file: int, types: list[tuple[int, int, int, int]]
) -> Header | int:
    """Return the header, or, where it goes on beyond the buffer, the bytes that it has at least.

    Raises HeaderError for a header that is malformed, ValueError for arguments that do not fit.
    """

# --- logits ---
def score_logits(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]
) -> npt.NDArray[np.void]:
    """Records (log_sum_exp, nll, target_p, top, broken), one per row of logits (rows, vocabulary).

    Nats; top is the most probable token, the lowest id on ties; broken is 1 where a logit is NaN
    or +inf or the target has no probability. Raises ValueError for shapes and targets that do not
    fit, TypeError for other dtypes or arrays that are not contiguous.
    """

def compare_logits(
    reference: npt.NDArray[np.float32],
    candidate: npt.NDArray[np.float32],
    targets: npt.NDArray[np.int32],
) -> npt.NDArray[np.void]:
    """Records (reference, candidate, kld, delta_p, same_top, broken), one per pair of rows.

    reference and candidate are records of score_logits; kld is KL(reference ‖ candidate) in nats,
    delta_p the target's probability under the candidate minus that under the reference.
    """

def exp_nonpositive(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]: ...

# --- gptq ---
def gptq_formats() -> list[str]: ...
def round_unit(
    format: str,  # noqa: A002
    x: npt.NDArray[np.float32],
    factor: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    out: npt.NDArray[np.uint8],
    errors: npt.NDArray[np.float32],
) -> None:
    """Round up to 256 columns of x (rows, n) one by one into blocks; x is changed in place.

    factor (256, 256) is the unit's part of U, upper triangular with H⁻¹ = UᵀU, the identity beyond
    n; importance (256) weighs the fit of scales; out is (rows, bytes), errors (rows, n) takes each
    column's error divided by the factor's diagonal. Raises ValueError for what does not fit and
    for scales that would overflow.
    """

def round_points(
    x: npt.NDArray[np.float32],
    factor: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    magnitudes: npt.NDArray[np.float32],
    even_signs: bool,
    points: npt.NDArray[np.uint16],
    signs: npt.NDArray[np.uint8],
    errors: npt.NDArray[np.float32],
) -> None:
    """Round 256 columns of x (rows, 256) to scale · sign · point; x is changed in place.

    magnitudes (4 or 8, points) are the points of a codebook; factor is that of round_unit; scales
    (rows, 8, 16 or 32) are those of the sub-blocks. even_signs: an even number of every 8 weights
    is negative. points (rows, 64 or 32), signs (rows, 32; bit i of byte b: weight 8b + i is
    negative) and errors (rows, 256; as those of round_unit) are filled. Raises ValueError for what
    does not fit.
    """

def descend(
    format: str,  # noqa: A002
    w: npt.NDArray[np.float32],
    hessian: npt.NDArray[np.float32],
    blocks: npt.NDArray[np.uint8],
    n_sweeps: int,
) -> npt.NDArray[np.float64]:
    """Lower eHeᵀ of each row e = w − q by changing codes and scales; returns it before and after.

    w is (rows, n), hessian (n, n) and symmetric; blocks (rows, bytes), which decode to q, are
    changed in place; the result is (rows, 2), and no row's second value is the larger. A row is
    finished after n_sweeps over its columns, or when one changes nothing. Raises ValueError for
    what does not fit.
    """
