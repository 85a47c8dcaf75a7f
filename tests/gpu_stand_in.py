"""A stand-in for a GPU, so that llama.cpp says by itself what it would put where.

It is ggml's CPU device under another name: its type is GPU, it has a buffer type of its own that is
not the host's, one of the host's as CUDA's pinned memory, and it takes over products of long
prompts as CUDA does. Nothing is computed; sizes are those that llama.cpp plans (no_alloc).

usage: python gpu_stand_in.py < requests.json > sizes.json, for the device is registered for good.
Its structs are those of ggml-backend-impl.h; where they end is asked of ggml's own accessors.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

from ramgguf.llama.breakdown import memory_breakdown
from ramgguf.llama.sizes import SizesOf, context_parameters

UNKNOWN_LAYOUT = 77  # exit status
_MOST_FIELDS = 64
_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU
_LEAST_BATCH = 32  # what CUDA takes over
# Fields of ggml_backend_buffer_type_i and ggml_backend_device_i that are replaced.
_BUFFER_NAME, _IS_HOST = 0, 5
_NAME, _TYPE, _INIT, _BUFFER_TYPE, _HOST_BUFFER_TYPE, _SUPPORTS_BUFFER, _TAKES_OVER = (
    0, 3, 5, 6, 7, 10, 11,
)  # fmt: skip

_Address = ctypes.c_void_p
_Fields = ctypes.c_void_p * _MOST_FIELDS


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", _Address))


class _Tensor(ctypes.Structure):
    """The beginning of ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", _Address),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
    )


class StandIn:
    """The registered device, and what llama.cpp plans with it."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self._ggml = ctypes.CDLL(str(folder / "libggml.so"))
        self._kept: list[Any] = []
        name_of = self._function(self._base, "ggml_op_name", ctypes.c_char_p, ctypes.c_int)
        ops = {name_of(i): i for i in range(64)}
        self._rows_of = {ops[b"MUL_MAT"]: 1, ops[b"MUL_MAT_ID"]: 2}
        self._cpu = self._function(self._ggml, "ggml_backend_dev_by_type", _Address, ctypes.c_int)(
            0
        )
        self.cpu_buffer_type = self._function(self._base, "ggml_backend_cpu_buffer_type", _Address)
        registry = self._index("ggml_backend_dev_backend_reg")
        self._backend_device = self._index("ggml_backend_get_device")
        self._device = self._copied(self._cpu, registry + 2)
        self.address = ctypes.addressof(self._device)
        self._gpu = self._buffer_type(b"GPU", self.address, is_host=False)
        self._host = self._buffer_type(b"GPU_Host", None, is_host=True)
        self._begin = ctypes.CFUNCTYPE(_Address, _Address, ctypes.c_char_p)(self._device[_INIT])
        self._replace()
        self._function(self._ggml, "ggml_backend_device_register", None, _Address)(self.address)

    def _function(self, library: Any, name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(library, name)
        found.restype, found.argtypes = result, list(arguments)
        return found

    def _index(self, accessor: str) -> int:
        """Return which field of a struct an accessor reads."""
        probe = _Fields(*(4096 * (i + 1) for i in range(_MOST_FIELDS)))
        found = self._function(self._base, accessor, _Address, _Address)(ctypes.addressof(probe))
        if not found or found % 4096 or not 0 < found // 4096 <= _MOST_FIELDS:
            sys.exit(UNKNOWN_LAYOUT)
        return int(found) // 4096 - 1

    def _copied(self, address: int, n_fields: int) -> Any:
        fields = _Fields(*(ctypes.c_void_p * n_fields).from_address(address))
        self._kept.append(fields)
        return fields

    def _callback(self, function: Callable[..., Any], result: Any, *arguments: Any) -> int | None:
        made = ctypes.CFUNCTYPE(result, *arguments)(function)
        self._kept.append(made)
        return ctypes.cast(made, _Address).value

    def _text(self, text: bytes) -> int | None:
        held = ctypes.c_char_p(text)
        self._kept.append(held)
        return ctypes.cast(held, _Address).value

    def _buffer_type(self, name: bytes, device: int | None, *, is_host: bool) -> int:
        end = self._index("ggml_backend_buft_get_device")
        fields, text = self._copied(self.cpu_buffer_type(), end), self._text(name)
        fields[_BUFFER_NAME] = self._callback(lambda _: text, _Address, _Address)
        fields[_IS_HOST] = self._callback(lambda _: is_host, ctypes.c_bool, _Address)
        fields[end] = device
        return ctypes.addressof(fields)

    def _replace(self) -> None:
        fields, name = self._device, self._text(b"GPU0")
        fields[_NAME] = self._callback(lambda _: name, _Address, _Address)
        fields[_TYPE] = self._callback(lambda _: _GPU, ctypes.c_int, _Address)
        fields[_INIT] = self._callback(self._begun, _Address, _Address, ctypes.c_char_p)
        fields[_BUFFER_TYPE] = self._callback(lambda _: self._gpu, _Address, _Address)
        fields[_HOST_BUFFER_TYPE] = self._callback(lambda _: self._host, _Address, _Address)
        fields[_SUPPORTS_BUFFER] = self._callback(
            lambda _, buffer_type: buffer_type == self._gpu, ctypes.c_bool, _Address, _Address
        )
        fields[_TAKES_OVER] = self._callback(self._takes_over, ctypes.c_bool, _Address, _Address)

    def _begun(self, _: int, parameters: bytes) -> int:
        backend = self._begin(self._cpu, parameters)
        fields = (ctypes.c_void_p * (self._backend_device + 1)).from_address(backend)
        fields[self._backend_device] = self.address
        return int(backend)

    def _takes_over(self, _: int, address: int) -> bool:
        tensor = _Tensor.from_address(address)
        dimension = self._rows_of.get(tensor.op)
        return dimension is not None and tensor.ne[dimension] >= _LEAST_BATCH

    def sizes(self, request: dict[str, Any]) -> dict[str, list[int]]:
        """Return weights, cache and compute in RAM and on the GPU."""
        parameters = llama_cpp.llama_model_default_params()
        devices = (_Address * 2)(self.address, None)
        parameters.devices = ctypes.cast(devices, _Address).value
        parameters.n_gpu_layers, parameters.no_alloc = request["n_gpu_layers"], True
        parameters.load_mode = 0
        overrides = (_Override * (request["n_cpu_moe"] + 1))()
        for i in range(request["n_cpu_moe"]):  # as --n-cpu-moe makes them in common/arg.cpp
            overrides[i].pattern = rb"blk\.%d\.ffn_(up|down|gate|gate_up)_(ch|)exps" % i
            overrides[i].buffer_type = self.cpu_buffer_type()
        parameters.tensor_buft_overrides = ctypes.cast(overrides, _Address).value
        model = llama_cpp.llama_model_load_from_file(request["path"].encode(), parameters)
        asked = SizesOf(path="", n_ctx=request["n_ctx"], n_seq=request["n_seq"],
                        type_k=request["type_k"], type_v=request["type_v"])  # fmt: skip
        context = llama_cpp.llama_init_from_model(model, context_parameters(llama_cpp, asked))
        found = memory_breakdown(llama_cpp, context)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
        if found is None:
            sys.exit(UNKNOWN_LAYOUT)
        return {
            where: [sum(getattr(b, what) for b in found if (b.name == "GPU") == (where == "vram"))
                    for what in ("weights", "cache", "compute")]
            for where in ("ram", "vram")
        }  # fmt: skip


if __name__ == "__main__":
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _Address)(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    stand_in = StandIn()
    print(json.dumps([stand_in.sizes(request) for request in json.load(sys.stdin)]))
