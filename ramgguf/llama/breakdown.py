"""How much memory llama.cpp takes for a model and a context, by buffer type, exact to the byte.

llama_get_memory_breakdown is what llama.cpp's own programs fit models with. It returns a std::map
by value; the map's nodes are read as GNU's libstdc++ lays them out. Whatever looks otherwise is
"unknown", and the caller estimates: nothing here may guess.
"""

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"
_MOST_BUFFER_TYPES = 64


@dataclass(frozen=True)
class BufferBytes:
    """Bytes in one type of buffer: of weights, of the context's memory (KV and state), of graphs"""

    name: str
    weights: int
    cache: int
    compute: int


class _Map(ctypes.Structure):
    """std::map of libstdc++: a comparison, then the header node of a red-black tree, its size."""

    _fields_ = (
        ("compare", ctypes.c_void_p),
        ("color", ctypes.c_void_p),
        ("root", ctypes.c_void_p),
        ("leftmost", ctypes.c_void_p),
        ("rightmost", ctypes.c_void_p),
        ("n_nodes", ctypes.c_size_t),
    )


class _Node(ctypes.Structure):
    """A node: color and links, then the key (a buffer type) and the three sizes."""

    _fields_ = (
        ("color", ctypes.c_void_p),
        ("parent", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("buffer_type", ctypes.c_void_p),
        ("weights", ctypes.c_size_t),
        ("cache", ctypes.c_size_t),
        ("compute", ctypes.c_size_t),
    )


def memory_breakdown(llama: ModuleType, context: Any) -> tuple[BufferBytes, ...] | None:
    """Return the context's memory by buffer type; None where this build cannot tell."""
    if not sys.platform.startswith("linux"):
        return None
    folder = Path(str(llama.__file__)).parent / "lib"
    try:
        function = getattr(ctypes.CDLL(str(folder / "libllama.so")), _SYMBOL)
        name_of = ctypes.CDLL(str(folder / "libggml-base.so")).ggml_backend_buft_name
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], _Map
    name_of.argtypes, name_of.restype = [ctypes.c_void_p], ctypes.c_char_p
    found = function(context)
    if not 0 < found.n_nodes <= _MOST_BUFFER_TYPES:
        return None
    nodes = list(_in_order(found.root, found.n_nodes))
    if len(nodes) != found.n_nodes:
        return None
    return tuple(
        BufferBytes(name_of(n.buffer_type).decode(), n.weights, n.cache, n.compute) for n in nodes
    )


def _in_order(address: int | None, most: int) -> Iterator[_Node]:
    """Yield the nodes below an address, left to right, and never more than one too many."""
    stack: list[_Node] = []
    n_seen = 0
    while (stack or address) and n_seen <= most:
        while address and len(stack) <= most:
            node = ctypes.cast(address, ctypes.POINTER(_Node)).contents
            stack.append(node)
            address = node.left
        node = stack.pop()
        n_seen += 1
        yield node
        address = node.right
