"""ggml's tensors as the evaluation callback hands them over, once their layout is proven.

ggml has no accessors for what a tensor was computed from, so the struct itself is read. Its layout
is no stable interface: `check_layout` compares every field with what ggml's own functions say about
tensors made for the purpose, and refuses a ggml that differs (struct ggml_tensor of ggml.h).
"""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError
from ramgguf.llama.system import llama_module

_OBJECT_BYTES = 32  # struct ggml_object, which ggml_tensor_overhead counts beside the tensor
_F32, _F16, _I32 = 0, 1, 26  # enum ggml_type, whose numbers are those of GGUF files


class Tensor(ctypes.Structure):
    """struct ggml_tensor; ne and nb count the elements and the stride in bytes per dimension."""


Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
)

TensorPointer = ctypes.POINTER(Tensor)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_POINTER, _INT, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (ctypes.c_char_p, ()),
    "ggml_init": (_POINTER, (_InitParams,)),
    "ggml_free": (None, (_POINTER,)),
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_new_tensor_3d": (TensorPointer, (_POINTER, _INT, _INT64, _INT64, _INT64)),
    "ggml_view_1d": (TensorPointer, (_POINTER, TensorPointer, _INT64, _SIZE)),
    "ggml_mul_mat": (TensorPointer, (_POINTER, TensorPointer, TensorPointer)),
    "ggml_mul_mat_id": (TensorPointer, (_POINTER, *[TensorPointer] * 3)),
    "ggml_set_name": (TensorPointer, (TensorPointer, ctypes.c_char_p)),
    "ggml_get_name": (_POINTER, (TensorPointer,)),
    "ggml_get_data": (_POINTER, (TensorPointer,)),
    "ggml_nbytes": (_SIZE, (TensorPointer,)),
    "ggml_op_name": (ctypes.c_char_p, (_INT,)),
    "ggml_backend_tensor_get": (None, (TensorPointer, _POINTER, _SIZE, _SIZE)),
}


@cache
def library() -> ctypes.CDLL:
    """Return libggml-base, the one that llama-cpp-python has loaded.

    Raises EngineError when it is not there or lacks a function.
    """
    folder = Path(str(llama_module().__file__)).parent / "lib"
    found = [p for p in sorted(folder.glob("*ggml-base.*")) if "import" not in p.name]
    if not found:
        raise EngineError(f"{folder}: no libggml-base; reinstall llama-cpp-python")
    loaded = ctypes.CDLL(str(found[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise EngineError(f"{found[0]}: no function {name}; this ggml is not known")
        function.restype, function.argtypes = result, arguments
    return loaded


@dataclass(frozen=True)
class Operations:
    """The numbers of the operations that multiply weights, in the installed ggml's enum ggml_op."""

    mul_mat: int
    mul_mat_id: int


@cache
def check_layout() -> Operations:
    """Return the operations' numbers once the installed ggml's tensors prove to be as Tensor says.

    Raises EngineError that names the first field that is not.
    """
    ggml = library()
    with _scratch(ggml) as memory:
        probes = _Probes(ggml, memory)
        for what, found, expected in probes.readings():
            if found != expected:
                version = ggml.ggml_version().decode()
                raise EngineError(
                    f"ggml {version} lays out its tensors in another way: {what} reads {found}, "
                    f"expected {expected}; install another version of llama-cpp-python"
                )
        return Operations(probes.dense.contents.op, probes.sparse.contents.op)


@contextmanager
def _scratch(ggml: ctypes.CDLL) -> Iterator[int]:
    memory = ggml.ggml_init(_InitParams(1 << 16, None, False))
    try:
        yield memory
    finally:
        ggml.ggml_free(memory)


class _Probes:
    """Tensors for the layout check: an F16 weight, F32 activations, and their products."""

    def __init__(self, ggml: ctypes.CDLL, memory: int) -> None:
        self._ggml = ggml
        self.weight = ggml.ggml_new_tensor_3d(memory, _F16, 8, 3, 2)
        ggml.ggml_set_name(self.weight, b"probe.weight")
        self.x = ggml.ggml_new_tensor_3d(memory, _F32, 8, 5, 2)
        self.ids = ggml.ggml_new_tensor_3d(memory, _I32, 5, 2, 1)
        self.dense = ggml.ggml_mul_mat(memory, self.weight, self.x)
        self.sparse = ggml.ggml_mul_mat_id(memory, self.weight, self.x, self.ids)
        self.view = ggml.ggml_view_1d(memory, self.x, 4, 16)

    def readings(self) -> Iterator[tuple[str, object, object]]:
        """Yield what is read, what it reads, and what it has to be by ggml's own functions."""
        size = self._ggml.ggml_tensor_overhead() - _OBJECT_BYTES
        yield "the size of a tensor", size, ctypes.sizeof(Tensor)
        yield from self._fields("weight", self.weight, _F16, [8, 3, 2, 1])
        yield from self._fields("x", self.x, _F32, [8, 5, 2, 1])
        yield from self._fields("dense", self.dense, _F32, [3, 5, 2, 1])
        yield from self._fields("sparse", self.sparse, _F32, [3, 5, 2, 1])
        yield from self._fields("view", self.view, _F32, [4, 1, 1, 1])
        yield "the name", self.weight.contents.name, b"probe.weight"
        yield "src of dense", _sources(self.dense), [address(self.weight), address(self.x)]
        three = [address(self.weight), address(self.x), address(self.ids)]
        yield "src of sparse", _sources(self.sparse), three
        view = self.view.contents
        yield "view_src", (view.view_src, view.view_offs), (address(self.x), 16)
        yield "op of dense", self._ggml.ggml_op_name(self.dense.contents.op), b"MUL_MAT"
        yield "op of sparse", self._ggml.ggml_op_name(self.sparse.contents.op), b"MUL_MAT_ID"

    def _fields(
        self, name: str, tensor: Any, type_id: int, ne: list[int]
    ) -> Iterator[tuple[str, object, object]]:
        found, ggml = tensor.contents, self._ggml
        element = 2 if type_id == _F16 else 4
        yield f"type of {name}", found.type, type_id
        yield f"ne of {name}", list(found.ne), ne
        yield f"nb of {name}", list(found.nb), [element * math.prod(ne[:i]) for i in range(4)]
        yield f"data of {name}", found.data, ggml.ggml_get_data(tensor)
        yield f"name of {name}", address(tensor) + Tensor.name.offset, ggml.ggml_get_name(tensor)


def _sources(tensor: Any) -> list[int]:
    return [address(s) for s in tensor.contents.src if s]


def address(tensor: Any) -> int:
    """Return where the tensor that a pointer points to lies."""
    return ctypes.addressof(tensor.contents)


def is_f32(tensor: Any) -> bool:
    """Return whether the tensor that a pointer points to has 32-bit floats."""
    return bool(tensor.contents.type == _F32)


def read_array(tensor: Any, dtype: type[np.float32] | type[np.int32]) -> NDArray[Any]:
    """Return a copy of an F32 or I32 tensor as an array, its dimensions in numpy's order.

    ggml copies the bytes, from wherever they are, so no data pointer is followed here.
    """
    found, expected = tensor.contents, _F32 if dtype is np.float32 else _I32
    if found.type != expected:
        raise EngineError(f"{found.name.decode()}: has type {found.type}, expected {expected}")
    ggml = library()
    n_bytes = ggml.ggml_nbytes(tensor)
    raw = np.empty(n_bytes, np.uint8)
    ggml.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, n_bytes)
    shape, strides = tuple(found.ne)[::-1], tuple(found.nb)[::-1]
    return np.ndarray(shape, dtype, raw, strides=strides)
