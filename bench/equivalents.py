"""What benches share that write a model of other tensors which computes the same.

Llama and Qwen2: a residual stream of `width` channels, RMS norms, grouped-query attention, and a
gated feed-forward network. Weights are float32, (n_rows, n_columns) or (n,), by tensor.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, hadamard

from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Silent
from ramgguf.gguf.architecture import part_of
from ramgguf.gguf.header import Value, ValueType, ggml_type, u32
from ramgguf.gguf.layout import Layout, metadata_records, plan_shard, sized
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.gguf.writer import GGUFOutput
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from ramgguf.quants.hessian import Hessians, gram_name, new_hessians
from ramgguf.quants.imatrix import Imatrix, InputSquares, write_imatrix
from ramgguf.transform import EXACT, departure

Floats = NDArray[np.float32]

ARCHITECTURES = ("llama", "qwen2")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
LAST_NORM = "output_norm.weight"
# Who reads the residual stream through a norm, whose gain stands before them.
NORM_OF = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attn_norm"),
    **dict.fromkeys(("ffn_gate", "ffn_up"), "ffn_norm"),
}
WRITERS = ("attn_output", "ffn_down")
NORMS = ("attn_norm", "ffn_norm", "output_norm")


@dataclass
class Model:
    """A model's weights in memory, its heads, and what has changed.

    keys are new metadata. The input of a matrix is turns[name] (n_new, n_old) times what it was in
    the model that was read, or as it was.
    """

    architecture: str
    weights: dict[str, Floats]
    n_heads: int
    n_kv_heads: int
    head_size: int
    epsilon: float  # of norms
    keys: dict[str, Value] = field(default_factory=dict)
    turns: dict[str, Floats] = field(default_factory=dict)
    _products: dict[tuple[int, int], tuple[Floats, Floats, Floats]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return int(self.weights[EMBEDDING].shape[1])

    @property
    def per_group(self) -> int:
        """Query heads that share a head of K and V."""
        return self.n_heads // self.n_kv_heads

    @property
    def layers(self) -> list[str]:
        """The prefixes of layers: `blk.0.` …"""
        return [f"{n.split('attn_v')[0]}" for n in self.weights if n.endswith(".attn_v.weight")]

    def reads(self) -> dict[str, str]:
        """Return the matrices that read the residual stream, and the gain before each."""
        found = {HEAD: LAST_NORM} if HEAD in self.weights else {}
        for name in self.weights:
            norm = NORM_OF.get(part_of(name, self.architecture))
            if norm is not None:
                found[name] = f"{name.rsplit('.', 2)[0]}.{norm}.weight"
        return found

    def writes(self) -> list[str]:
        """Return the matrices that add to the residual stream."""
        return [n for n in self.weights if part_of(n, self.architecture) in WRITERS]

    def turn(self, name: str, by: Floats) -> None:
        """Note that a matrix's input is multiplied with by (n_new, n_old)."""
        before = self.turns.get(name)
        if before is None:
            self.turns[name] = by
            return
        key = id(by), id(before)  # those that share an input share the product
        if key not in self._products:
            self._products[key] = by, before, by @ before
        self.turns[name] = self._products[key][2]

    def set(self, key: str, value: int | float) -> None:
        """Change a key of the architecture."""
        kind = u32(value) if isinstance(value, int) else Value(ValueType.FLOAT32, value)
        self.keys[f"{self.architecture}.{key}"] = kind


def read_model(file: GGUFFile) -> Model:
    """Return the model; raises SystemExit for a graph that is not known here."""
    arch, numbers = file.architecture, file.metadata.integer
    known = {*NORM_OF, *WRITERS, *NORMS, "token_embd", "output"}
    known |= {f"attn_{x}.bias" for x in "qkv"}
    strange = {part_of(t.name, arch) for t in file.tensors} - known
    if arch not in ARCHITECTURES or strange:
        raise SystemExit(f"{file.paths[0]}: {arch} with {sorted(strange)} is not known here")
    weights = {}
    for tensor in file.tensors:
        rows = file.read_rows(tensor, 0, tensor.n_rows)
        decoded = decode_rows(tensor.type_name, rows, tensor.row_length)
        weights[tensor.name] = decoded[0] if len(tensor.shape) == 1 else decoded
    n_heads = numbers(f"{arch}.attention.head_count") or 1
    size = numbers(f"{arch}.attention.value_length") or weights[EMBEDDING].shape[1] // n_heads
    n_kv = numbers(f"{arch}.attention.head_count_kv") or n_heads
    epsilon = file.metadata[f"{arch}.attention.layer_norm_rms_epsilon"]
    assert isinstance(epsilon, float)
    return Model(arch, weights, n_heads, n_kv, size, epsilon)


def write_model(model: Model, source: GGUFFile, path: Path) -> Path:
    """Write the model, in the source's types, new tensors in that of its embedding."""
    types = {t.name: t.type_name for t in source.tensors}
    tensors = []
    for name, w in model.weights.items():
        kind = ggml_type(types.get(name, types[EMBEDDING]))
        info = TensorInfo(name, w.shape[::-1], kind.name, kind.id, kind.n_bytes(w.size), 0, 0)
        tensors.append(sized(info, kind.name, source.alignment))
    records = metadata_records(source, model.keys)
    shard, planned = plan_shard(path, 0, records, tensors, source.alignment)
    with GGUFOutput(Layout((shard,), {t.name: t for t in planned}), source, force=True) as output:
        for tensor, type_name, _, _ in tensors:
            rows = np.ascontiguousarray(np.atleast_2d(model.weights[tensor.name]))
            output.write_at(tensor.name, 0, in_type(type_name, rows))
        return output.commit()[0]


def exactness(path: Path, source: Path) -> float:
    """Return the KLD to the source, nats per token; SystemExit where it is no rounding error."""
    kld = departure(path, source, threads=default_threads(), progress=Silent())
    if kld > EXACT:
        raise SystemExit(f"{path}: computes something else than {source}: KLD {kld:.2g}")
    return kld


def write_matrix(model: Model, imatrix: Imatrix, path: Path) -> Path:
    """Write the importance matrix of a model that has changed, by that of the model as it was.

    Rotations need the Hessians with it: of an input T x, Σ(T x)² is the diagonal of T (Σxxᵀ) Tᵀ.
    """
    entries: dict[str, InputSquares] = {}
    hessians = imatrix.hessians
    n_tokens = np.float32(hessians.n_tokens if hessians else 1)
    known: dict[tuple[str, int], Floats] = {}  # by owner and turn: Q, K and V have the same
    for name, entry in imatrix.entries.items():
        squares = entry.values[0]
        turn = model.turns.get(name)
        if turn is not None:
            key = (hessians and hessians.owner(name)) or name, id(turn)
            if key not in known:
                gram = hessians.get(name, turn.shape[1]) if hessians else None
                known[key] = _turned(turn, squares if gram is None else gram / n_tokens)
            squares = known[key]
        entries[name] = InputSquares(squares[None].astype(np.float64), np.ones(1, np.int64))
    write_imatrix(path, entries, dataset="turned", n_chunks=1, chunk_size=1, force=True)
    return path


def write_hessians(model: Model, hessians: Hessians, path: Path) -> Path:
    """Write the Hessians of a model that has changed, T (Σxxᵀ) Tᵀ, by those of it as it was."""
    width = {name: model.weights[name].shape[1] for name in hessians.owners}
    sizes = {owner: width[owner] for owner in hessians.owners.values()}
    n_tokens = hessians.n_tokens
    with new_hessians(path, hessians.owners, sizes, n_tokens, force=True) as out:
        for owner in sizes:
            turn = model.turns.get(owner)
            gram = hessians.get(owner, width[owner] if turn is None else turn.shape[1])
            assert gram is not None  # there is an owner
            out.write(gram_name(owner), gram if turn is None else _congruent(turn, gram))
        out.commit()
    return path


def _congruent(turn: Floats, gram: Floats) -> Floats:
    product = turn @ gram @ turn.T
    found: Floats = np.add(product, product.T, dtype=np.float32)  # symmetric to the last bit
    return found / np.float32(2)


def _turned(turn: Floats, moments: Floats) -> Floats:
    """Return Σ(T x)² by Σxxᵀ; Σx² is enough where T but selects and scales."""
    if moments.ndim == 1:
        if np.count_nonzero(turn, axis=1).max() > 1:
            raise SystemExit("the importance matrix of a rotated model takes Hessians")
        return np.square(turn) @ moments
    found: Floats = ((turn @ moments) * turn).sum(axis=1)
    return found


def pad_residual(model: Model, wide: int) -> None:
    """Give the residual stream channels that are always zero, `wide` in all.

    A norm divides by the mean square over all of them, which is less by n / wide: so are the
    epsilon beside it and, by the root, gains.
    """
    n, w = model.width, model.weights
    extra = wide - n
    share = n / wide
    more = np.eye(wide, n, dtype=np.float32)
    for name in (EMBEDDING, *model.reads()):
        w[name] = np.pad(w[name], ((0, 0), (0, extra)))
        model.turn(name, more)
    for name in model.writes():
        w[name] = np.pad(w[name], ((0, extra), (0, 0)))
    for name in w:
        if part_of(name, model.architecture) in NORMS:
            w[name] = np.pad(w[name] * np.float32(np.sqrt(share)), (0, extra))
    model.epsilon *= share
    model.set("attention.layer_norm_rms_epsilon", model.epsilon)
    model.set("embedding_length", wide)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        model.set(key, model.head_size)


def pad_heads(model: Model, n_heads: int) -> None:
    """Give each group query heads of zeros, whose outputs nothing reads: n_heads in all."""
    groups, old, size = model.n_kv_heads, model.per_group, model.head_size
    extra = n_heads // groups - old
    same = np.eye(groups * old * size, dtype=np.float32).reshape(groups, old, size, -1)
    more = np.pad(same, ((0, 0), (0, extra), (0, 0), (0, 0))).reshape(n_heads * size, -1)
    for prefix in model.layers:
        for name in (f"{prefix}attn_q.weight", f"{prefix}attn_q.bias"):
            if name in model.weights:
                q = model.weights[name]
                rows = q.reshape(groups, old, size, -1)
                rows = np.pad(rows, ((0, 0), (0, extra), (0, 0), (0, 0)))
                model.weights[name] = rows.reshape(n_heads * size, *q.shape[1:])
        name = f"{prefix}attn_output.weight"
        o = model.weights[name]
        columns = o.reshape(len(o), groups, old, size)
        columns = np.pad(columns, ((0, 0), (0, 0), (0, extra), (0, 0)))
        model.weights[name] = columns.reshape(len(o), n_heads * size)
        model.turn(name, more)
    model.n_heads = n_heads
    model.set("attention.head_count", n_heads)


def pad(model: Model, *, with_heads: bool = True) -> None:
    """Pad the rows of matrices to multiples of 256; those of the output projection with heads."""
    n_heads = model.n_heads
    while with_heads and n_heads * model.head_size % 256:
        n_heads += model.n_kv_heads
    pad_heads(model, n_heads)
    pad_residual(model, -(-model.width // 256) * 256)


def orthogonal(n: int, rng: np.random.Generator) -> Floats:
    """Return a random orthogonal matrix (n, n): a Hadamard matrix for the power of two in n, times
    (as Kronecker products) one by QR for what is left of n, columns with random signs.
    """
    two = n & -n
    q, r = np.linalg.qr(rng.standard_normal((n // two, n // two)))
    q *= np.sign(r.diagonal())
    signs = rng.choice((-1.0, 1.0), n)
    found: Floats = (np.kron(hadamard(two) / np.sqrt(two), q) * signs).astype(np.float32)
    return found


def rotate_values(model: Model, rng: np.random.Generator) -> None:
    """Rotate each head's V, and back in the output projection."""
    groups, each, size = model.n_kv_heads, model.per_group, model.head_size
    for prefix in model.layers:
        turns = np.stack([orthogonal(size, rng) for _ in range(groups)])
        for name in (f"{prefix}attn_v.weight", f"{prefix}attn_v.bias"):
            if name in model.weights:
                v = model.weights[name]
                model.weights[name] = (turns @ v.reshape(groups, size, -1)).reshape(v.shape)
        name = f"{prefix}attn_output.weight"
        o = model.weights[name]
        apart = o.reshape(len(o), groups, each, size)
        model.weights[name] = (apart @ turns.swapaxes(1, 2)).reshape(o.shape)
        model.turn(name, block_diag(*np.repeat(turns, each, axis=0)).astype(np.float32))


def fold_gains(model: Model) -> None:
    """Multiply the gains of norms into what reads them; a tied head becomes a tensor of its own."""
    w = model.weights
    w.setdefault(HEAD, w[EMBEDDING])
    inverse: dict[str, Floats] = {}  # of what a gain is: nothing passes it where it is 0
    for name, norm in model.reads().items():
        if norm not in inverse:
            divided = np.divide(1, w[norm], out=np.zeros_like(w[norm]), where=w[norm] != 0)
            inverse[norm] = np.diag(divided)
        w[name] = w[name] * w[norm]
        model.turn(name, inverse[norm])
    for name in w:
        if part_of(name, model.architecture) in NORMS:
            w[name] = np.ones_like(w[name])


def rotate_residual(model: Model, rng: np.random.Generator, n: int | None = None) -> None:
    """Fold the gains and rotate the first n channels of the residual stream (None: all)."""
    fold_gains(model)
    n = n or model.width
    turn = orthogonal(n, rng)
    whole = np.eye(model.width, dtype=np.float32)
    whole[:n, :n] = turn
    for name in (EMBEDDING, *model.reads()):
        w = model.weights[name]
        model.weights[name] = np.concatenate([w[:, :n] @ turn.T, w[:, n:]], axis=1)
        model.turn(name, whole)
    for name in model.writes():
        w = model.weights[name]
        model.weights[name] = np.concatenate([turn @ w[:n], w[n:]])
