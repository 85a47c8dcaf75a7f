"""What an encoder is: how the weights of a tensor become blocks of a format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ramgguf.quants.hessian import Hessian

Floats = NDArray[np.float32]
EncodeOutput = Callable[[str, Floats, Hessian, Floats], NDArray[np.uint8]]


@dataclass(frozen=True)
class Encoder:
    """One way to fit blocks to weights.

    kernel is how the core's kernels fit the scales of a block. An encoder with `encode_output`
    minimises the error of the tensor's output instead, where a Hessian is known and the format is
    one of `output_formats`: it takes a format, rows (n, columns), the Hessian and the importance
    of the columns, and returns blocks (n, bytes of a row). `plans_by` names the encoder by whose
    errors formats are chosen; by default its own.
    """

    name: str
    summary: str
    kernel: Literal["rtn", "search"]
    encode_output: EncodeOutput | None = None
    output_formats: frozenset[str] = frozenset()
    plans_by: str | None = None

    @property
    def weighs_columns(self) -> bool:
        """Whether the blocks depend on the importance of the columns, where it is known."""
        return self.kernel != "rtn"

    @property
    def needs_hessian(self) -> bool:
        """Whether it can do nothing without Hessians."""
        return self.encode_output is not None

    def encodes_output(self, format_name: str) -> bool:
        """Return whether it minimises the error of the output in this format."""
        return format_name in self.output_formats
