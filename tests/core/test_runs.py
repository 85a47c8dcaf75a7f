"""Many small tensors at one go: the same as one after the other, in fewer steps."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

import ramgguf
from gguf_samples import finish_gguf
from ramgguf import _core
from ramgguf.core import parallel
from ramgguf.core.errors import FormatError, GGUFError
from ramgguf.core.files import AtomicFile
from ramgguf.core.parallel import Chunk, map_chunks, map_runs, runs, sample
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import open_gguf
from ramgguf.gguf.shards import Shard
from ramgguf.gguf.writer import GGUFOutput
from ramgguf.measure import rate_distortion
from ramgguf.quantize import verify, write
from ramgguf.quants import formats

Bytes = NDArray[np.uint8]
N_LAYERS = 40


def _write(path: Path, *, alignment: int = 32, bad: str = "", seed: int = 5) -> Path:
    """Write a model of many small tensors in three types, some of lengths that need padding."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYERS)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for layer in range(N_LAYERS):
        shapes = {"attn_norm": (7,), "attn_q": (5, 256), "ffn_up": (9, 288), "ffn_down": (3, 512)}
        for name, shape in shapes.items():
            full = f"blk.{layer}.{name}.weight"
            x = rng.standard_t(5, shape).astype(np.float32 if layer % 3 else np.float16)
            if full == bad:
                x[1, 2] = 1e9  # a scale that F16 cannot hold
            writer.add_tensor(full, x)
    writer.add_tensor("token_embd.weight", rng.standard_normal((4200, 256)).astype(np.float16))
    finish_gguf(writer)
    return path


@dataclass(frozen=True)
class Shape:
    n_rows: int
    row_length: int


def test_runs_are_all_chunks_in_order_small_ones_together() -> None:
    tensors = [Shape(40, 1000), Shape(1, 64), Shape(3000, 4096), *[Shape(7, 512)] * 900]
    found = list(runs(tensors))
    chunks = [c for run in found for c in run]
    for i, tensor in enumerate(tensors):
        own = [c for c in chunks if c.index == i]
        assert [c.start for c in own] == [0, *(c.stop for c in own[:-1])]
        assert own[-1].stop == tensor.n_rows
    assert [c.index for c in chunks] == sorted(c.index for c in chunks)
    sizes = [sum((c.stop - c.start) * tensors[c.index].row_length for c in run) for run in found]
    assert max(sizes) <= parallel.CHUNK_WEIGHTS
    assert min(a + b for a, b in itertools.pairwise(sizes)) > parallel.CHUNK_WEIGHTS
    assert len(found) < 18  # 12 for the large tensor, 3 or 4 for 900 small ones


@pytest.mark.parametrize("threads", [1, 3])
def test_runs_and_chunks_are_mapped_in_order(threads: int) -> None:
    work = [[Chunk(i, j, j + 1) for j in range(i % 4)] for i in range(50)]
    assert list(map_runs(list, work, threads)) == work
    assert list(map_chunks(lambda c: c, work, threads)) == [c for run in work for c in run]


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_ranges_are_the_rows_and_neighbours_are_read_at_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignment: int
) -> None:
    reads: list[int] = []
    read = Shard.read

    def counted(shard: Shard, offset: int, buffer: memoryview) -> None:
        reads.append(len(buffer))
        read(shard, offset, buffer)

    with open_gguf(_write(tmp_path / "m.gguf", alignment=alignment)) as file:
        chosen = [(t, 0, t.n_rows) for t in file.tensors[:30]]
        chosen += [(t, 1, 3) for t in file.tensors if "ffn_up" in t.name]
        chosen += [(file.tensors[-1], 17, 400), (file.tensors[3], 0, 1)]
        expected = [file.read_rows(*range_) for range_ in chosen]
        monkeypatch.setattr(Shard, "read", counted)
        asked: list[int] = []

        def take(n: int) -> Bytes:
            asked.append(n)
            return np.empty(n, np.uint8)

        rows, spans = file.read_ranges(chosen, take)
    for own, other, (tensor, start, stop) in zip(rows, expected, chosen, strict=True):
        assert own.shape == (stop - start, tensor.row_bytes)
        np.testing.assert_array_equal(own, other)
    assert [len(span) for span in spans] == reads
    assert asked == [max(asked)]
    assert sum(reads) <= asked[0] < sum(reads) + 32 * len(reads)
    if alignment >= 32:
        assert len(reads) == 1 + N_LAYERS + 2  # neighbours at one go
    first = np.concatenate([np.ravel(r) for r in rows[:2]])
    assert spans[0][: len(np.ravel(rows[0]))].tobytes() == first[: rows[0].size].tobytes()


def test_ranges_of_a_file_cut_short_name_the_tensor(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf")
    with open_gguf(path) as file:
        cut = file.tensors[25]
        os.truncate(path, cut.offset + 5)
        with pytest.raises(GGUFError, match=rf"'{cut.name}': the file ends at byte .*cut short"):
            file.read_ranges(
                [(t, 0, t.n_rows) for t in file.tensors[20:30]], lambda n: np.empty(n, np.uint8)
            )


def test_neighbours_are_written_at_one_go_and_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    write_at = AtomicFile.write_at

    def counted(file: AtomicFile, offset: int, *data: bytes | memoryview) -> None:
        writes.append(len(data))
        write_at(file, offset, *data)

    source, target = _write(tmp_path / "m.gguf"), tmp_path / "copy.gguf"
    with open_gguf(source) as file:
        layout = plan_layout(target, file, {}, {})
        with GGUFOutput(layout, file, force=False) as out:
            monkeypatch.setattr(AtomicFile, "write_at", counted)
            pieces = [(t.name, 0, file.read_rows(t, 0, t.n_rows)) for t in file.tensors]
            odd, even = pieces[1::2], pieces[::2]
            out.write_pieces(odd)
            assert len(writes) == len(odd)
            writes.clear()
            out.write_pieces(even[:20] + even[30:])
            out.write_pieces(reversed(even[20:30]))
            assert len(writes) == len(even)
            out.commit()
        assert _data(target) == _data(source)
        writes.clear()
        with GGUFOutput(plan_layout(target, file, {}, {}), file, force=True) as out:
            writes.clear()  # the header
            out.write_pieces(pieces)
            assert len(writes) == 1
            out.commit()
    assert _data(target) == _data(source)


def _data(path: Path) -> list[bytes]:
    with open_gguf(path) as file:
        return [file.read_rows(t, 0, t.n_rows).tobytes() for t in file.tensors]


def test_a_system_that_writes_a_little_at_a_time_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        assert 0 < len(views) <= 1024
        some = b"".join(views)[:7]
        written.append(len(some))
        return os.pwrite(fd, some, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    pieces = [bytes([i % 251]) * (i % 5) for i in range(2000)]
    whole = b"".join(pieces)
    file = AtomicFile(tmp_path / "a", len(whole) + 3, force=False, error=GGUFError)
    file.write_at(3, *pieces)
    with pytest.raises(ValueError, match="outside of"):
        file.write_at(4, *pieces)
    file.commit()
    assert (tmp_path / "a").read_bytes() == bytes(3) + whole
    assert sum(written) == len(whole)


def _jobs(seed: int) -> list[tuple[Bytes, NDArray[np.float32] | None]]:
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((n, 512)).astype(np.float32) for n in (1, 7, 3)]
    weights = [None, rng.random(512).astype(np.float32), None]
    return [(x.view(np.uint8), w) for x, w in zip(rows, weights, strict=True)]


@pytest.mark.parametrize("encoder", ["rtn", "search"])
def test_many_are_the_same_as_each(encoder: str) -> None:
    names = ("Q4_K", "Q6_K", "Q8_0")
    jobs = _jobs(1)
    together = _core.measure_many([(names, "F32", x, w) for x, w in jobs], encoder=encoder)
    alone = [_core.measure(list(names), "F32", x, encoder=encoder, importance=w) for x, w in jobs]
    assert [s.error_rows() for s in together] == [s.error_rows() for s in alone]
    assert [s.sum_squares for s in together] == [s.sum_squares for s in alone]
    for s in together:
        assert s.error_rows() == [
            (e.format, e.sum_squared_error, e.weighted_squared_error, e.max_error, e.scale_overflow)
            for e in s.errors
        ]
    for name in names:
        outs = [np.zeros((len(x), formats.row_bytes(name, 512)), np.uint8) for x, _ in jobs]
        _core.encode_many(
            [(name, "F32", x, out, w) for (x, w), out in zip(jobs, outs, strict=True)],
            encoder=encoder,
        )
        for (x, w), out in zip(jobs, outs, strict=True):
            own = np.zeros_like(out)
            _core.encode(name, "F32", x, own, encoder=encoder, importance=w)
            np.testing.assert_array_equal(own, out)
        compared = _core.compare_many(
            [("F32", x, name, out, w) for (x, w), out in zip(jobs, outs, strict=True)]
        )
        for s, (x, w), out in zip(compared, jobs, outs, strict=True):
            assert s.error_rows() == _core.compare("F32", x, name, out, importance=w).error_rows()


def test_no_jobs_are_no_work() -> None:
    assert _core.measure_many([]) == []
    assert _core.compare_many([]) == []
    _core.encode_many([])


def test_one_bad_job_of_many_is_an_error() -> None:
    good, bad = (x for x, _ in _jobs(2)[:2])
    bad.view(np.float32)[3, 5] = np.nan
    outs = [np.zeros((len(x), formats.row_bytes("Q4_K", 512)), np.uint8) for x in (good, bad)]
    with pytest.raises(ValueError, match="first in row 3, column 5"):
        _core.encode_many(
            [("Q4_K", "F32", x, out, None) for x, out in zip((good, bad), outs, strict=True)]
        )
    with pytest.raises(ValueError, match="'Q4_9' is unknown"):
        _core.measure_many([(("Q4_K",), "F32", good, None), (("Q4_9",), "F32", good, None)])
    with pytest.raises(TypeError):  # half a job, as only callers without a type checker can write
        _core.compare_many([("F32", good)])  # type: ignore[list-item]


def test_the_misfit_among_many_tensors_is_named(tmp_path: Path) -> None:
    bad = "blk.22.ffn_up.weight"
    good, misfit = _write(tmp_path / "m.gguf"), _write(tmp_path / "bad.gguf", bad=bad)
    measured = ramgguf.measure(misfit, formats=["Q4_0", "Q8_0"])
    (found,) = (t for t in measured.tensors if t.name == bad)
    assert found.excluded["Q4_0"] == "a block's scale would overflow F16"
    plan = ramgguf.plan(ramgguf.measure(good, formats=["Q4_0"]), "4.6bpw", min_sqnr_db=0)
    forced = plan.model_copy(update={"source": measured.source})
    with pytest.raises(FormatError, match=rf"{bad}: a block of src near row 1.*too large for Q4_0"):
        ramgguf.quantize(misfit, None, tmp_path / "out.gguf", from_plan=forced)


def test_a_nan_among_many_tensors_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf")
    with open_gguf(path) as file:
        tensor = file.tensor("blk.22.ffn_down.weight")
    with path.open("r+b") as raw:
        raw.seek(tensor.offset + 2 * tensor.row_bytes + 4 * 11)
        raw.write(np.float32(np.nan).tobytes())
    with pytest.raises(FormatError, match=rf"{tensor.name}\[{2 * 512 + 11}\] is NaN"):
        ramgguf.measure(path)


def test_small_tensors_come_out_as_they_do_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "m.gguf")
    outputs, curves, digests = [], [], []
    for threads in (1, 3):
        measured = ramgguf.measure(path, threads=threads)
        digests.append(measured.source.data_sha256)
        curves.append(measured.tensors)
        made = tmp_path / f"{threads}.gguf"
        plan = ramgguf.plan(measured, "6bpw", min_sqnr_db=0)
        ramgguf.quantize(path, None, made, from_plan=plan, threads=threads)
        outputs.append(made.read_bytes())
    assert curves[0] == curves[1]
    assert outputs[0] == outputs[1]
    assert digests[0] == digests[1] is not None
    # A run for every chunk, as if no tensor were small.
    single = [[c] for run in runs(_shapes(path)) for c in run]
    monkeypatch.setattr(rate_distortion, "runs", lambda _: iter(single))
    monkeypatch.setattr(write, "runs", lambda _: iter(single))
    monkeypatch.setattr(verify, "runs", lambda _: iter(single))
    assert ramgguf.measure(path).tensors == curves[0]
    ramgguf.quantize(path, None, tmp_path / "single.gguf", from_plan=plan)
    assert (tmp_path / "single.gguf").read_bytes() == outputs[0]


def _shapes(path: Path) -> list[Shape]:
    with open_gguf(path) as file:
        return [Shape(t.n_rows, t.row_length) for t in file.tensors]


def test_other_data_have_another_digest(tmp_path: Path) -> None:
    one, other = (_write(tmp_path / f"{seed}.gguf", seed=seed) for seed in (1, 2))
    digests = [ramgguf.measure(p).source.data_sha256 for p in (one, other)]
    assert digests[0] != digests[1]


def test_samples_are_spread_over_every_tensor_and_come_in_small_runs() -> None:
    tensors = [Shape(3, 64), Shape(9000, 4096), Shape(128, 1 << 20), *[Shape(9, 256)] * 50]
    found = list(sample(tensors))
    chunks = [c for run in found for c in run]
    assert [c.index for c in chunks] == sorted(c.index for c in chunks)
    for i, tensor in enumerate(tensors):
        own = [c for c in chunks if c.index == i]
        n_rows = sum(c.stop - c.start for c in own)
        share = n_rows / tensor.n_rows
        assert share == 1 or n_rows * tensor.row_length >= parallel.SAMPLE_WEIGHTS
        assert max(b.start - a.stop for a, b in itertools.pairwise([*own, own[-1]])) <= (
            tensor.n_rows / len(own)
        )
    sizes = [sum((c.stop - c.start) * tensors[c.index].row_length for c in run) for run in found]
    assert max(sizes) <= parallel.CHUNK_WEIGHTS  # however long the rows, a run is one of them
    assert len(found[-1]) >= 50


@pytest.mark.parametrize("threads", [1, 2])
def test_a_threads_matrix_products_start_no_threads(threads: int) -> None:
    def pools(_: int) -> list[int]:
        np.ones((64, 64)) @ np.ones((64, 64))
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = pools(0)
    for found in parallel.ordered_map(pools, range(4), threads):
        assert found == [1] * len(before)
    assert pools(0) == before
