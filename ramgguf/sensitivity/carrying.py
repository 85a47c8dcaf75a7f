"""What α is carried by: the error that a quantization leaves in the residual stream, layers later.

A pass that ends soon behind the changed layer is short. The KLD per error there is smooth in depth,
so whole passes are needed in some layers only; α of the layers between is their error times the KLD
per error of the same role around them (bench/carried_alpha.py).
"""

from dataclasses import replace

from ramgguf.gguf.architecture import layer_of, role_of
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.llama.forward import ForwardRequest, ForwardRunner
from ramgguf.llama.tokens import TokenRequest
from ramgguf.sensitivity.readings import probe_format
from ramgguf.sensitivity.starts import Depth, TensorPass

HOPS = 2  # layers that the error passes through before it is read
STRIDE = 4  # whole passes are run in every so many layers
# Whole passes are run for these in all layers: ffn_down writes massive activations, and the size of
# an error in them does not say how much KLD it makes.
_READ_WHOLE = frozenset({"ffn_down", "ffn_down_exps", "ffn_down_shexp", "ffn_down_chexps"})
_TRIED = 16  # tokens


def is_carried(file: GGUFFile, tensor: TensorInfo) -> bool:
    """Return whether the tensor's α may be carried from other layers of the trunk."""
    layer = layer_of(tensor.name)
    role = role_of(tensor.name, file.architecture, tied=file.has_tied_embedding)
    return layer is not None and layer < (file.n_trunk_layers or 0) and role not in _READ_WHOLE


def layer_pass(depth: Depth, tensor: TensorInfo) -> TensorPass:
    """Return the short pass that tells what the tensor's quantization does to a later layer."""
    return TensorPass(tensor, min(depth.first(tensor) + HOPS, len(depth.shares) - 1))


def tells_errors(
    passes: ForwardRunner, depth: Depth, tensor: TensorInfo, request: TokenRequest
) -> bool:
    """Return whether llama.cpp tells what a layer puts out, by a short pass over random tokens."""
    ids = passes.draw(replace(request, tokens="random", n_ctx=_TRIED), range(1))
    change = (tensor.name, probe_format(tensor))
    asked = ForwardRequest((change,), ids, end=layer_pass(depth, tensor).end)
    return all(found.errors is not None for _, found in passes.run([asked]))
