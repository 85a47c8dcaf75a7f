"""Whatever a GGUF file holds: it opens, or it is refused with an error, soon and at little cost."""

import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import gguf_samples
from gguf_samples import SOUND, File, Key, Tensor, finish_gguf
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError, PlanError
from ramgguf.gguf.reader import open_gguf, require_language_model

_EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
_HEADER = len(SOUND.header())


def _check(path: Path, message: str) -> None:
    assert message.startswith(f"{path}: ")
    assert message.isprintable()


def _open_and_use(path: Path) -> bool:
    """Open the file and touch all that it offers; return whether it was accepted."""
    try:
        file = open_gguf(path)
    except GGUFError as e:
        _check(path, str(e))
        return False
    with file:
        for key in file.metadata:
            _ = file.metadata[key]
        for tensor in file.tensors:
            assert tensor.n_bytes == file.read_rows(tensor, 0, tensor.n_rows).nbytes
        try:
            require_language_model(file)
            assert file.n_weights > 0
        except GGUFError as e:
            _check(path, str(e))
    return True


_mutation = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, _HEADER - 1), st.integers(0, 255)),
    st.tuples(st.just("u32"), st.integers(0, _HEADER - 4), st.sampled_from(_EXTREMES)),
    st.tuples(st.just("u64"), st.integers(0, _HEADER - 8), st.sampled_from(_EXTREMES)),
    st.tuples(st.just("cut"), st.integers(0, _HEADER), st.integers(1, 64)),
    st.tuples(st.just("repeat"), st.integers(0, _HEADER), st.integers(1, 64)),
)


def _mutate(content: bytearray, kind: str, at: int, value: int) -> None:
    if kind == "byte":
        content[at : at + 1] = bytes([value])
    elif kind == "u32":
        content[at : at + 4] = struct.pack("<I", value & 0xFFFFFFFF)
    elif kind == "u64":
        content[at : at + 8] = struct.pack("<Q", value)
    elif kind == "cut":
        del content[at : at + value]
    else:
        content[at:at] = content[at : at + value]


@settings(max_examples=400, deadline=1000)
@given(mutations=st.lists(_mutation, min_size=1, max_size=6))
def test_mutated_headers_are_refused_or_sound(
    mutations: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(SOUND.bytes())
    for kind, at, value in mutations:
        _mutate(content, kind, at, value)
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(content)
    _open_and_use(path)


def test_every_field_at_its_extremes_is_refused_or_sound(tmp_path: Path) -> None:
    content = SOUND.bytes()
    path = tmp_path / "extreme.gguf"
    tried = accepted = 0
    for field in gguf_samples.header_fields(SOUND):
        end = field.offset + field.n_bytes
        assert end <= _HEADER
        for value in {v % 256**field.n_bytes for v in _EXTREMES}:
            edited = value.to_bytes(field.n_bytes, "little")
            path.write_bytes(content[: field.offset] + edited + content[end:])
            start = time.process_time()
            accepted += _open_and_use(path)
            tried += 1
            assert time.process_time() - start < 1, field
    assert tried > 500
    assert 0 < accepted < tried // 2


# Run in a process of its own: address space is limited to what is in use plus 64 MB and the file.
_LIMITED = """
import resource, sys, time
from pathlib import Path
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError, PlanError
from ramgguf.gguf.reader import open_gguf

def in_use():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

for name in sys.argv[1:]:
    start = time.process_time()
    limit = in_use() + 64_000_000 + Path(name).stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        with open_gguf(Path(name)) as file:
            n_keys = len(file.metadata)
            print("accepted", n_keys, len(file.tensors))
    except GGUFError as e:
        print("refused" if time.process_time() - start < 1 else "slowly refused", e)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def _open_within_64_mb(paths: list[Path]) -> list[str]:
    command = [sys.executable, "-c", _LIMITED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_malformed_files_cost_no_memory(tmp_path: Path) -> None:
    paths = []
    for i, case in enumerate(gguf_samples.hostile_files()):
        paths.append(tmp_path / f"{i}.gguf")
        paths[-1].write_bytes(case.content)
    lines = _open_within_64_mb(paths)
    assert len(lines) == len(paths) > 90
    assert all(line.startswith("refused") for line in lines)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_the_largest_header_that_is_accepted_costs_little(tmp_path: Path) -> None:
    n_keys, n_tensors = 4_096, 65_536
    keys = [Key(f"{i:05}{'k' * 1019}", gguf_samples.U8, b"\x00") for i in range(n_keys)]
    tensors = [Tensor(f"{i:05}{'t' * 58}", (8, 1, 1, 1), 0, 32 * i) for i in range(n_tensors)]
    path = tmp_path / "large.gguf"
    path.write_bytes(File(keys=keys, tensors=tensors, data=bytes(32 * n_tensors)).bytes())
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert _open_within_64_mb([path]) == [f"accepted {n_keys} {n_tensors}"]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5


def test_strings_that_end_far_away_do_not_take_long(tmp_path: Path) -> None:
    key = Key("k", gguf_samples.STRING, struct.pack("<Q", 2**40))
    path = tmp_path / "sparse.gguf"
    path.write_bytes(SOUND.with_key(key).header())
    with path.open("r+b") as file:
        file.truncate(2**41)  # sparse: takes no disk
    start = time.process_time()
    with pytest.raises(GGUFError, match="header goes on beyond 134217728 bytes"):
        open_gguf(path)
    assert time.process_time() - start < 1


_U16, _I32 = gguf_samples.U16, gguf_samples.I32
_SHARD = {"split.no": (_U16, b"\0\0"), "split.count": (_U16, b"\1\0"),
          "split.tensors.count": (_I32, struct.pack("<i", 3))}  # fmt: skip
_OTHER = (
    (gguf_samples.STRING, gguf_samples.text("../../m-00001-of-00002.gguf")),
    (gguf_samples.ARRAY, gguf_samples.array(_U16, 1, b"\1\0")),
    (gguf_samples.F32, struct.pack("<f", float("nan"))),
    (gguf_samples.U64, struct.pack("<Q", 2**64 - 1)),
    (_I32, struct.pack("<i", -1)),
    (_U16, b"\xff\xff"),
)


@pytest.mark.parametrize("key", _SHARD)
@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00001.gguf", "m-00001-of-65535.gguf"])
def test_odd_numbers_of_shards_are_refused(key: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for other in (None, *_OTHER):
        records = {**_SHARD, key: other or _SHARD[key]}
        keys = [Key(k, *record) for k, record in records.items()]
        path.write_bytes(File(keys=(*gguf_samples.SOUND_KEYS, *keys)).bytes())
        if "65535" in name:
            with pytest.raises(GGUFError, match=r"00002-of-65535.gguf: cannot be opened"):
                open_gguf(path)
        else:
            assert _open_and_use(path) == (other is None)


def test_names_in_metadata_never_become_paths(tmp_path: Path) -> None:
    text = gguf_samples.text("../../elsewhere-00001-of-00002.gguf")
    keys = [Key(k, gguf_samples.STRING, text) for k in ("general.name", "general.source.url")]
    path = tmp_path / "inner" / "m-00001-of-00001.gguf"
    path.parent.mkdir()
    path.write_bytes(File(keys=(gguf_samples.ARCHITECTURE, *keys)).bytes())
    with open_gguf(path) as file:
        assert file.paths == (path,)


_NAMES = ("[/x] [bold]odd.weight", "../../blk.0.:smile:.weight", "blk.0.ffn_up.weight")


@pytest.fixture
def oddly_named(tmp_path: Path) -> Path:
    """A sound model with names that a terminal's library may take for markup."""
    path = tmp_path / "in" / "ner" / "[red]model.gguf"
    path.parent.mkdir(parents=True)
    out = GGUFWriter(path, "llama")
    out.add_name("../../[/x]\n\x1b[2Jname")
    out.add_block_count(1)
    for name in _NAMES:
        out.add_tensor(name, np.random.default_rng(1).standard_normal((64, 256)).astype("f2"))
    finish_gguf(out)
    return path


def test_names_are_shown_as_they_are(oddly_named: Path, tmp_path: Path) -> None:
    folder, safe = oddly_named.parent, ("--min-sqnr", "0")
    curves, plan, output = (str(folder / f"[x]{name}") for name in ("m.json", "p.json", "o.gguf"))

    def run(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exception is None, arguments
        assert "\x1b" not in done.output
        return done.output.replace("\n", "")

    size = ("-b", "8bpw", *safe)
    assert curves in run("measure", oddly_named, "-o", curves)
    assert plan in run("plan", curves, *size, "-o", plan)
    run("curve", curves, *safe)
    for shown in (
        run("quantize", oddly_named, *size, "-o", output, "--verbose", "--effort", "fast"),
        run("plan", curves, *size, "--verbose"),
        run("diff", oddly_named, output, "--verbose"),
        run("explain", plan, "-m", curves),
    ):
        assert all(name in shown for name in _NAMES[:2])
    assert _NAMES[0] in run("explain", plan, _NAMES[0], "-m", curves)
    assert str(oddly_named) in run("recipe", oddly_named)
    run("quantize", oddly_named, *size, "--split-max-size", "20kB", "--effort", "fast")
    # Whatever the names say, all outputs are where they were wanted.
    written = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.parent for p in written} == {folder}
    assert len(written) >= 6
    with pytest.raises(PlanError, match=r"\[x\]missing"):
        app(["plan", str(tmp_path / "[x]missing"), *size], standalone_mode=False)
