"""Types of the native core."""

import numpy as np
import numpy.typing as npt

# --- kernels ---
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...

# --- gguf ---
class HeaderError(ValueError): ...

class KeySpan:
    @property
    def key(self) -> str: ...
    @property
    def type(self) -> int: ...
    @property
    def item_type(self) -> int: ...
    @property
    def n_items(self) -> int: ...
    @property
    def begin(self) -> int: ...
    @property
    def value_begin(self) -> int: ...
    @property
    def end(self) -> int: ...

class TensorSpan:
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...

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
    def keys(self) -> list[KeySpan]: ...
    @property
    def tensors(self) -> list[TensorSpan]: ...

def scan_header(
    buffer: bytes | bytearray | memoryview, n_file: int, types: list[tuple[int, int, int]]
) -> Header | None: ...

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
