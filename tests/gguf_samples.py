"""Small GGUF files, byte by byte: sound ones, and malformed ones with what must be said of them."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
MAX64 = 2**64 - 1


def text(value: str | bytes) -> bytes:
    """Return a string as it stands in the file."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def array(item_type: int, count: int, items: bytes) -> bytes:
    """Return an array's item type, count and items."""
    return struct.pack("<IQ", item_type, count) + items


@dataclass(frozen=True)
class Key:
    """A key/value record; value is raw."""

    name: str | bytes
    type: int
    value: bytes

    def record(self) -> bytes:
        return text(self.name) + struct.pack("<I", self.type) + self.value


@dataclass(frozen=True)
class Tensor:
    """A tensor info as declared, and the bytes that it really takes in the data section."""

    name: str | bytes
    shape: Sequence[int]
    type: int = 0
    offset: int = 0
    n_dims: int | None = None

    def record(self) -> bytes:
        n_dims = len(self.shape) if self.n_dims is None else self.n_dims
        shape = struct.pack(f"<{len(self.shape)}Q", *self.shape)
        return text(self.name) + struct.pack("<I", n_dims) + shape + struct.pack(
            "<IQ", self.type, self.offset
        )  # fmt: skip


ARCHITECTURE = Key("general.architecture", STRING, text("llama"))
SOUND_KEYS = (
    ARCHITECTURE,
    Key("general.name", STRING, text("tiny")),
    Key("llama.block_count", U32, struct.pack("<I", 2)),
    Key("tiny.u8", U8, b"\x07"),
    Key("tiny.i8", I8, b"\xff"),
    Key("tiny.u16", U16, b"\x01\x02"),
    Key("tiny.i16", I16, b"\xfe\xff"),
    Key("tiny.i32", I32, struct.pack("<i", -3)),
    Key("tiny.f32", F32, struct.pack("<f", 0.5)),
    Key("tiny.bool", BOOL, b"\x01"),
    Key("tiny.u64", U64, struct.pack("<Q", 2**40)),
    Key("tiny.i64", I64, struct.pack("<q", -(2**40))),
    Key("tiny.f64", F64, struct.pack("<d", 0.1)),
    Key("tiny.tokens", ARRAY, array(STRING, 3, text("a") + text("é") + text(b"\xff\xfe"))),
    Key("tiny.scores", ARRAY, array(F32, 3, struct.pack("<3f", 1, 2, 3))),
    Key("tiny.flags", ARRAY, array(BOOL, 2, b"\x00\x01")),
    Key("tiny.empty", ARRAY, array(I32, 0, b"")),
)
SOUND_TENSORS = (
    Tensor("token_embd.weight", (32, 3), 8, 0),
    Tensor("blk.0.attn_norm.weight", (8,), 0, 128),
    Tensor("blk.0.ffn_up_exps.weight", (4, 2, 3), 1, 160),
)
SOUND_DATA_BYTES = 224


@dataclass(frozen=True)
class File:
    """A GGUF file; counts are those of the lists unless declared otherwise."""

    keys: Sequence[Key] = SOUND_KEYS
    tensors: Sequence[Tensor] = SOUND_TENSORS
    data: bytes = field(default=bytes(range(SOUND_DATA_BYTES)), repr=False)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    n_keys: int | None = None
    n_tensors: int | None = None

    def header(self) -> bytes:
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        start = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys)
        return start + b"".join(
            [r.record() for r in self.keys] + [t.record() for t in self.tensors]
        )

    def bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data

    def with_key(self, key: Key) -> "File":
        return replace(self, keys=(*self.keys, key))

    def with_tensor(self, tensor: Tensor) -> "File":
        return replace(self, tensors=(*self.tensors, tensor))


SOUND = File()


@dataclass(frozen=True)
class Field:
    """A number in the header: where it is, and of how many bytes."""

    name: str
    offset: int
    n_bytes: int


_SCALARS = {U8: 1, I8: 1, U16: 2, I16: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, I64: 8, F64: 8}


def header_fields(file: File) -> Iterator[Field]:
    """Yield every number in the header: versions, counts, lengths, types, values, shapes, offsets.

    Of an array's items, the first.
    """
    yield from (Field("magic", 0, 4), Field("version", 4, 4))
    yield from (Field("tensors", 8, 8), Field("keys", 16, 8))
    at = 24
    for key in file.keys:
        value = at + len(text(key.name)) + 4
        yield from (Field(f"{key.name!r} length", at, 8), Field(f"{key.name!r} type", value - 4, 4))
        if key.type == ARRAY:
            yield from (
                Field(f"{key.name!r} items", value, 4),
                Field(f"{key.name!r} n", value + 4, 8),
            )
            item = int.from_bytes(key.value[:4], "little")
            if len(key.value) > 12:
                yield Field(f"{key.name!r} first", value + 12, _SCALARS.get(item, 8))
        else:
            yield Field(f"{key.name!r} value", value, _SCALARS.get(key.type, 8))
        at += len(key.record())
    for tensor in file.tensors:
        shape = at + len(text(tensor.name)) + 4
        end = at + len(tensor.record())
        yield from (Field(f"{tensor.name!r} length", at, 8), Field("dimensions", shape - 4, 4))
        yield from (
            Field(f"{tensor.name!r} ne", shape + 8 * i, 8) for i in range(len(tensor.shape))
        )
        yield from (Field(f"{tensor.name!r} type", end - 12, 4), Field("offset", end - 8, 8))
        at = end


@dataclass(frozen=True)
class Hostile:
    """A malformed file, and a part of what must be said of it."""

    label: str
    content: bytes = field(repr=False)
    message: str


def _bad_starts() -> Iterator[Hostile]:
    yield Hostile("empty", b"", "the magic runs past the end of the file")
    yield Hostile("magic", File(magic=b"GGML").bytes(), "no GGUF file.*at byte 0")
    for version in (0, 1, 4, 2**31, 2**32 - 1):
        yield Hostile(f"version {version}", File(version=version).bytes(), "version.*at byte 4|big")
    big = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    yield Hostile("big-endian", big, "big-endian.*at byte 4")
    for n in (2**63, MAX64, 2**32, 70_000):
        yield Hostile(f"{n} tensors", File(n_tensors=n).bytes(), r"tensors; at most.*at byte 8")
        yield Hostile(f"{n} keys", File(n_keys=n).bytes(), r"keys; at most.*at byte 16")
    many = File(n_tensors=len(SOUND_TENSORS) + 1).bytes()
    yield Hostile("one tensor more than there are", many, "tensor 3 ")
    many_keys = File(n_keys=len(SOUND_KEYS) + 1, tensors=(), data=b"").bytes()
    yield Hostile("one key more than there are", many_keys, "key 17 ")


def _bad_keys() -> Iterator[Hostile]:
    def one(label: str, key: Key, message: str) -> Hostile:
        return Hostile(label, SOUND.with_key(key).bytes(), message)

    huge = struct.pack("<Q", MAX64)
    for n in (2**63, MAX64, 2**32, 10_000):
        start = SOUND.header()[:24] + struct.pack("<Q", n)
        yield Hostile(f"key of {n} bytes", start, "name of key 0 runs past the end.*at byte 32")
        value = struct.pack("<Q", n)
        yield one(f"string of {n} bytes", Key("k", STRING, value), "value of key 'k' runs past")
        for item, label in ((U8, "bytes"), (STRING, "strings"), (F64, "doubles")):
            many = Key("k", ARRAY, array(item, n, b""))
            yield one(f"array of {n} {label}", many, "key 'k' (runs past|declares|has)|tensor")
    yield one("long key", Key("k" * 1025, U8, b"\x00"), "key 17 has 1025 bytes; at most 1024")
    yield one("empty key", Key("", U8, b"\x00"), "key 17 has an empty name")
    yield one("key with a line feed", Key("a\nb", U8, b"\x00"), "key 17 is not printable UTF-8")
    yield one("key of no UTF-8", Key(b"a\xc0\xaf", U8, b"\x00"), "not printable UTF-8")
    yield one("key with a surrogate", Key(b"\xed\xa0\x80", U8, b"\x00"), "not printable UTF-8")
    yield one("key with a C1 control", Key("a\x9bb", U8, b"\x00"), "not printable UTF-8")
    for kind in (13, 255, 2**31, 2**32 - 1):
        yield one(f"value type {kind}", Key("k", kind, b"\x00" * 8), f"unknown value type {kind}")
        items = Key("k", ARRAY, array(kind, 1, b"\x00" * 8))
        yield one(f"array of type {kind}", items, f"key 'k' is an array of an unknown type {kind}")
    nested = b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(100_000))
    yield one("nested arrays", Key("k", ARRAY, nested), "key 'k' is an array of arrays")
    yield one("string past the end", Key("k", ARRAY, array(STRING, 1, huge)), "key 'k' runs past")
    yield one("key twice", Key("general.name", U8, b"\x00"), "key 'general.name' is there twice")
    for alignment in (0, 3, 48, 2**32 - 1):
        value = struct.pack("<I", alignment)
        yield one(f"alignment {alignment}", Key("general.alignment", U32, value), "no power of two")
    yield one("alignment of u64", Key("general.alignment", U64, bytes(8)), "must be a uint32")
    yield one("alignment as text", Key("general.alignment", STRING, text("32")), "must be a uint32")
    big = struct.pack("<I", 2**31)
    yield one("alignment of 2 GiB", Key("general.alignment", U32, big), "no multiple|outside")


def _bad_tensors() -> Iterator[Hostile]:
    def one(label: str, tensor: Tensor, message: str) -> Hostile:
        return Hostile(label, SOUND.with_tensor(tensor).bytes(), message)

    at = SOUND_DATA_BYTES
    yield one(
        "name of 64 bytes", Tensor("t" * 64, (1,), 0, at), "tensor 3 has 64 bytes; at most 63"
    )
    yield one("empty name", Tensor("", (1,), 0, at), "tensor 3 has an empty name")
    yield one("name with a NUL", Tensor("a\0b", (1,), 0, at), "not printable UTF-8")
    yield one("name with escapes", Tensor("\x1b[2J", (1,), 0, at), "not printable UTF-8")
    for n in (5, 255, 2**31, 2**32 - 1):
        yield one(f"{n} dimensions", Tensor("t", (1,), 0, at, n), f"'t' has {n} dimensions")
    yield one("a dimension of 0", Tensor("t", (4, 0), 0, at), "tensor 't' has a dimension of 0")
    for shape in ((2**63,), (MAX64,), (2**32, 2**32), (2**16,) * 4, (2**62, 2), (2, 2**62)):
        yield one(f"shape {shape}", Tensor("t", shape, 0, at), "tensor 't' has a .*overflows")
    yield one("bytes that overflow", Tensor("t", (2**61,), 0, at), "size in bytes that overflows")
    for kind in (4, 5, 36, 200, 2**31, 2**32 - 1):
        yield one(f"type {kind}", Tensor("t", (32,), kind, at), f"'t' is of an unknown type {kind}")
    yield one("rows of half a block", Tensor("t", (48,), 8, at), "rows of 48 weights, no multiple")
    yield one("misaligned data", Tensor("t", (1,), 0, at + 4), "offset 228, no multiple.*alignment")
    for offset in (2**63, MAX64 - 31, 2**40, at + 32):
        yield one(f"data at {offset}", Tensor("t", (8,), 0, offset), "'t' lies outside the file")
    yield one("data too long", Tensor("t", (2**50,), 0, at), "'t' lies outside the file.*cut short")
    yield one("overlap", Tensor("t", (8,), 0, 64), "tensor 't' overlaps tensor 'token_embd.weight'")
    yield one("the same data", Tensor("t", (24,), 0, 0), "overlaps")
    yield one("tensor twice", Tensor("token_embd.weight", (1,), 0, at), "is there twice")


def hostile_files() -> tuple[Hostile, ...]:
    """Return every malformed file of the corpus."""
    return (*_bad_starts(), *_bad_keys(), *_bad_tensors())


def quantizable() -> File:
    """Return a small model in F16, with the keys that cards show."""
    n_rows, n_columns = {"token_embd.weight": 3, "blk.0.attn_q.weight": 2, "output.weight": 3}, 64
    tensors, values = [], b""
    for name, n in n_rows.items():
        tensors.append(Tensor(name, (n_columns, n), 1, len(values)))
        values += np.linspace(-1, 1, n_columns * n, dtype=np.float16).tobytes()
    keys = {
        "general.name": "Tiny", "general.license": "mit", "general.source.url": "https://x.org/a",
        "general.base_model.0.repo_url": "https://huggingface.co/org/base",
        "general.source.huggingface.repository": "org/base", "ramgguf.version": "0.1.0",
    }  # fmt: skip
    told = [Key(name, STRING, text(v)) for name, v in keys.items()]
    layers = Key("llama.block_count", U32, struct.pack("<I", 1))
    return File((ARCHITECTURE, layers, *told), tensors, values)


def finish_gguf(out: GGUFWriter) -> None:
    """Write all that was added to the file, and close it."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write_model(
    path: Path,
    *,
    rng: np.random.Generator,
    n_layers: int = 2,
    width: int = 256,
    n_tokens: int = 300,
    alignment: int | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Write a small llama-like model of F16 weights with gguf's own writer; return its path."""
    out = GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    if alignment is not None:
        out.add_custom_alignment(alignment)
    out.add_name("small")
    out.add_block_count(n_layers)
    out.add_tokenizer_model("gpt2")
    out.add_token_list([f"token{i}" for i in range(n_tokens)])
    out.add_token_scores([float(i) for i in range(n_tokens)])

    def add(name: str, *shape: int) -> None:
        dtype = np.float16 if len(shape) > 1 else np.float32
        out.add_tensor(name, rng.standard_normal(shape).astype(dtype))

    add("token_embd.weight", n_tokens, width)
    add("output_norm.weight", width)
    for i in range(n_layers):
        add(f"blk.{i}.attn_norm.weight", width)
        add(f"blk.{i}.attn_q.weight", width, width)
        add(f"blk.{i}.ffn_down_exps.weight", 3, width, 2 * width)
        add(f"blk.{i}.odd.weight", 5, 33)
    finish_gguf(out)
    return path
