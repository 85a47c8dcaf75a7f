"""The memory of a context from the header alone: an estimate, for where llama.cpp cannot tell.

Caches follow llama.cpp: src/llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-memory-recurrent.cpp
and llama-hparams.cpp of late 2026. Keys that are unknown here, such as those of sparse attention
with an index, are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ramgguf.gguf.architecture import TOKEN_EMBEDDING
from ramgguf.gguf.header import ggml_type
from ramgguf.gguf.reader import GGUFFile

N_UBATCH = 512
_CELL_PADDING = 256

# Architectures whose layers keep a recurrent state and nothing else.
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
# Architectures whose layers have both attention and a state.
_BOTH = frozenset({"falcon-h1"})
# Default where the file does not say: every n-th layer has full attention, the others a window.
_WINDOW_PERIODS = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gemma-embedding": 6, "cohere2": 4, "gpt-oss": 2,
    "exaone4": 4, "olmo2": 4, "smallthinker": 4,
}  # fmt: skip
# Default where the file does not say: every n-th layer has attention, the others are recurrent.
_ATTENTION_PERIODS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
_ENCODERS = ("bert", "t5encoder", "nomic-bert", "jina-bert", "neo-bert", "modern-bert", "eurobert")


@dataclass(frozen=True)
class ContextShape:
    """A context: n_ctx tokens of each of n_seq sequences, and the types of its caches."""

    n_ctx: int
    n_seq: int = 1
    type_k: str = "F16"
    type_v: str = "F16"


class Header:
    """A model's hyperparameters, by llama.cpp's names of keys."""

    def __init__(self, file: GGUFFile) -> None:
        self._metadata = file.metadata
        self.architecture = file.architecture
        self.n_layers = file.n_layers or 0
        self.width = self.integer("embedding_length", 0)
        self.n_vocab = next((t.shape[1] for t in file.tensors if t.name == TOKEN_EMBEDDING), 0)

    def integer(self, key: str, default: int) -> int:
        """Return the architecture's value of a key, or the default."""
        found = self._metadata.integer(f"{self.architecture}.{key}")
        return default if found is None else found

    def per_layer(self, key: str, default: Sequence[int]) -> list[int]:
        """Return a value for each layer, of a key that holds one for all or one for each."""
        name = f"{self.architecture}.{key}"
        each = self._metadata.numbers(name)
        if each is not None:
            values = [int(v) for v in each[: self.n_layers]]
            return values + list(default[len(values) :])
        flag, one = self._metadata.flag(name), self._metadata.integer(name)
        if flag is None and one is None:
            return list(default)
        return [int(flag or one or 0)] * self.n_layers


def cache_bytes(file: GGUFFile, shape: ContextShape) -> tuple[int, ...]:
    """Return what each layer keeps of the context: keys and values, or recurrent state."""
    header = Header(file)
    n = header.n_layers
    if header.architecture.startswith(_ENCODERS):
        return (0,) * n
    state = shape.n_seq * _state_bytes(header)
    recurrent, attends = _kinds(header, has_state=state > 0)
    attention = _attention_bytes(header, shape)
    return tuple(state * recurrent[i] + attention[i] * attends[i] for i in range(n))


def _kinds(header: Header, *, has_state: bool) -> tuple[list[bool], list[bool]]:
    """Return for each layer whether it keeps a recurrent state, and whether keys and values."""
    n, name = header.n_layers, header.architecture
    if name in _RECURRENT:
        return [True] * n, [False] * n
    heads = header.per_layer("attention.head_count_kv", [1] * n)
    period = header.integer("full_attention_interval", _ATTENTION_PERIODS.get(name, 0))
    attends = [(i + 1) % period == 0 if period else heads[i] > 0 for i in range(n)]
    recurrent = [has_state and (name in _BOTH or not a) for a in attends]
    n_shared = header.integer("attention.shared_kv_layers", 0)  # use the cache of earlier ones
    return recurrent, [a and i < n - n_shared for i, a in enumerate(attends)]


def _state_bytes(header: Header) -> int:
    """Return what one layer keeps of one sequence: convolution and recurrence, in F32."""
    width = header.width
    if head := header.integer("wkv.head_size", 0):
        return 4 * (header.integer("token_shift_count", 2) * width + width * head)
    if cached := header.integer("shortconv.l_cache", 0):
        return 4 * width * (cached - 1)
    conv = max(0, header.integer("ssm.conv_kernel", 0) - 1)
    inner, state = header.integer("ssm.inner_size", 0), header.integer("ssm.state_size", 0)
    if head := header.integer("kda.head_dim", 0):
        n_heads = header.integer("attention.head_count", 0)
        return 4 * (3 * conv * n_heads * head + head * head * n_heads)
    n_groups = header.integer("ssm.group_count", 0)
    return 4 * (conv * (inner + 2 * n_groups * state) + state * inner)


def _attention_bytes(header: Header, shape: ContextShape) -> list[int]:
    """Return the bytes of each layer's keys and values; layers with a window keep one window."""
    n = header.n_layers
    heads = header.per_layer("attention.head_count", [1] * n)
    kv_heads = header.per_layer("attention.head_count_kv", heads)
    full = _padded(shape.n_ctx)
    window = header.integer("attention.sliding_window", 0)
    windowed = _padded(min(full, window + N_UBATCH))
    slides = _windows(header) if window else [False] * n
    latent = header.integer("attention.kv_lora_rank", 0) > 0
    latent = latent and header.integer("attention.key_length_mla", 0) > 0
    found = []
    for i in range(n):
        size = header.width // max(1, heads[i])
        key = header.integer("attention.key_length", size)
        value = header.integer("attention.value_length", size)
        if slides[i]:
            key = header.integer("attention.key_length_swa", key)
            value = header.integer("attention.value_length_swa", value)
        row = _row_bytes(key * kv_heads[i], shape.type_k)
        if not latent:  # values are part of the keys there
            row += _row_bytes(value * kv_heads[i], shape.type_v)
        found.append(row * (windowed if slides[i] else full) * shape.n_seq)
    return found


def _windows(header: Header) -> list[bool]:
    """Return for each layer whether it attends to a window only; False where that is unknown."""
    n, key = header.n_layers, "attention.sliding_window_pattern"
    pattern = header.per_layer(key, [])
    if len(set(pattern)) > 1 or pattern == [1] * n:
        return [bool(p) for p in pattern]
    period = pattern[0] if pattern else _WINDOW_PERIODS.get(header.architecture, 0)
    return [period > 0 and i % period < period - 1 for i in range(n)]


def _row_bytes(n: int, type_name: str) -> int:
    kind = ggml_type(type_name)
    return -(-n // kind.block_weights) * kind.block_bytes


def _padded(n: int) -> int:
    return -(-n // _CELL_PADDING) * _CELL_PADDING


def compute_bytes(file: GGUFFile, shape: ContextShape) -> int:
    """Return about what one batch's activations take: logits or the widest layer, and the mask.

    llama.cpp's own figure depends on its graph: an estimate that is right to a factor of 1.5.
    """
    header = Header(file)
    heads = max(header.per_layer("attention.head_count", [1] * header.n_layers), default=1)
    head = header.integer("attention.key_length", header.width // max(1, heads))
    ffn = max(header.per_layer("feed_forward_length", [0] * header.n_layers), default=0)
    n_used = header.integer("expert_used_count", 0)
    experts = n_used * header.integer("expert_feed_forward_length", ffn)
    inner = 7 * header.integer("ssm.inner_size", 0)
    if header.integer("wkv.head_size", 0):
        inner = 14 * header.width
    layer = 4 * header.width + max(3 * ffn, 3 * experts, 4 * heads * head, inner)
    widest = max(header.n_vocab + header.width, layer)
    per_cell = 2
    if header.integer("attention.relative_buckets_count", 0):
        per_cell += 14 * heads  # T5: no flash attention, so scores and their biases are kept
    return N_UBATCH * (4 * widest + per_cell * _mask_cells(header, shape))


def _mask_cells(header: Header, shape: ContextShape) -> int:
    """Return the cells of the caches that a batch is masked against, in F16."""
    if header.architecture in _RECURRENT:
        return 0
    if header.architecture.startswith(_ENCODERS):
        return N_UBATCH
    window = header.integer("attention.sliding_window", 0)
    slides = _windows(header) if window else []
    cells = 0 if slides and all(slides) else _padded(shape.n_ctx)
    return cells + (_padded(min(shape.n_ctx, window + N_UBATCH)) if any(slides) else 0)
