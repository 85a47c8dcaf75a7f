"""Calibration: what llama.cpp's callback sees, against a forward pass in NumPy, and the files."""

import ctypes
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

import ramgguf
from interruptible import unwatched
from numpy_llama import Forward
from ramgguf.core.corpus import Corpus
from ramgguf.core.errors import EngineError
from ramgguf.gguf.architecture import is_looked_up, sharers
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama import ggml
from ramgguf.llama.capture import Sums, Taken, Tap, add_dense, add_routed
from ramgguf.llama.client import Engine
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.sources import dataset_name, file_tag, parse_sources, shares
from ramgguf.llama.tokens import TokenRequest, draw_sequences
from ramgguf.quants.hessian import add_grams, groups, load_hessians, mirror
from ramgguf.quants.imatrix import load_imatrix
from shown_stages import ShownStages
from small_models import ARCHITECTURES, N_VOCAB, write_small_model
from tiny_models import N_HEADS, write_tiny_model

pytest.importorskip("llama_cpp")

FIELDS: list[tuple[str, Any]] = [(field[0], field[1]) for field in ggml.Tensor._fields_]
RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("calibrate") / "tiny.gguf")


def _weights(path: Path) -> list[str]:
    with open_gguf(path) as file:
        return [t.name for t in file.tensors if len(t.shape) > 1]


def _taken(path: Path, ids: np.ndarray, grams: tuple[str, ...] = ()) -> Taken:
    """Return what a tap takes of a sequence, read in two chunks."""
    tap = Tap(_weights(path), grams)
    with LlamaModel(path, n_ctx=64, n_threads=1, eval_callback=tap.callback) as model:
        for part in (ids[:20], ids[20:]):
            model.decode(part)
            tap.check()
    return tap.taken


class _CountingTap(Tap):
    """A tap that counts how often the head is computed."""

    n_heads = 0

    def _called(self, pointer: int, ask: bool, user_data: object) -> bool:
        node = ctypes.cast(pointer, ggml.TensorPointer).contents
        head = self._head.name
        if not ask and head and node.src[0] and node.src[0].contents.name == head.encode():
            self.n_heads += 1
        return super()._called(pointer, ask, user_data)


def test_sums_of_squares_are_those_of_a_forward_pass_in_numpy(tiny: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 250, size=33, dtype=np.int32)
    forward = Forward(tiny, N_HEADS, N_HEADS)
    forward.logits(ids)
    taken = _taken(tiny, ids)
    assert set(taken.sums) == set(_weights(tiny)) - {"token_embd.weight"}
    for name, sums in taken.sums.items():
        expected = np.square(forward.inputs[name]).sum(axis=0)
        np.testing.assert_allclose(sums.squares[0], expected, rtol=0.03, err_msg=name)
        assert sums.counts.tolist() == [33]


def test_grams_are_those_of_a_forward_pass_and_shared_where_the_input_is(tiny: Path) -> None:
    ids = np.random.default_rng(1).integers(3, 250, size=33, dtype=np.int32)
    forward = Forward(tiny, N_HEADS, N_HEADS)
    forward.logits(ids)
    owners = _taken(tiny, ids).owners
    block = "blk.1."
    assert owners[block + "attn_k.weight"] == owners[block + "attn_v.weight"]
    assert owners[block + "ffn_gate.weight"] == owners[block + "ffn_up.weight"]
    assert len(set(owners.values())) == 4 * 2 + 1
    taken = _taken(tiny, ids, tuple(set(owners.values())))
    assert set(taken.grams) == set(owners.values())
    for name, gram in taken.grams.items():
        x = forward.inputs[name]
        np.testing.assert_allclose(gram, x.T @ x, rtol=0.03, atol=0.01 * np.abs(x.T @ x).max())


def test_every_expert_has_the_sums_of_the_tokens_it_saw(tmp_path: Path) -> None:
    moe = next(a for a in ARCHITECTURES if a.name == "qwen3moe")
    path = write_small_model(tmp_path / "moe.gguf", moe)
    ids = np.random.default_rng(2).integers(N_VOCAB, size=40, dtype=np.int32)
    forward = Forward(path, 4, 2, neox=True, n_chosen=2)
    forward.logits(ids)
    taken = _taken(path, ids)
    names = [n for n in taken.sums if "_exps" in n]
    assert len(names) == 6
    for name in names:
        sums = taken.sums[name]
        assert sums.counts.sum() == 2 * 40
        for expert, count in enumerate(sums.counts):
            x = forward.expert_inputs[name, expert]
            assert count == len(x)
            expected = np.square(x).sum(axis=0)
            tolerance = 0.05 * expected.mean() + 1e-12
            np.testing.assert_allclose(sums.squares[expert], expected, rtol=0.05, atol=tolerance)


def test_a_tied_embedding_is_seen_as_the_head(tmp_path: Path) -> None:
    tied = next(a for a in ARCHITECTURES if a.name == "qwen3")
    path = write_small_model(tmp_path / "tied.gguf", tied)
    ids = np.random.default_rng(3).integers(N_VOCAB, size=40, dtype=np.int32)
    forward = Forward(path, 4, 2, neox=True)
    forward.logits(ids)
    squares = _taken(path, ids).sums["token_embd.weight"].squares[0]
    expected = np.square(forward.inputs["token_embd.weight"]).sum(axis=0)
    np.testing.assert_allclose(squares, expected, rtol=0.05)


@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES if not (a.embeds or a.has_encoder)])
def test_every_architecture_is_calibrated_without_harm(name: str, tmp_path: Path) -> None:
    path = write_small_model(tmp_path / "m.gguf", next(a for a in ARCHITECTURES if a.name == name))
    ids = np.random.default_rng(4).integers(N_VOCAB, size=24, dtype=np.int32)
    with LlamaModel(path, n_ctx=64, n_threads=1) as model:
        plain = model.decode(ids).copy()
    with open_gguf(path) as file:
        head = "token_embd.weight" if file.has_tied_embedding else "output.weight"
    tap, short = Tap(_weights(path)), _CountingTap(_weights(path), head=head)
    with LlamaModel(path, n_ctx=64, n_threads=1, eval_callback=tap.callback) as model:
        watched = model.decode(ids).copy()
        tap.check()
        model.decode(ids)
        tap.check()
    np.testing.assert_allclose(watched, plain, atol=1e-3)
    short.skips_head = True
    with LlamaModel(path, n_ctx=64, n_threads=1, eval_callback=short.callback) as model:
        for _ in range(2):
            model.decode(ids)
            short.check()
    assert short.n_heads == 1  # the first graph tells where the head's input is
    assert set(short.taken.sums) == set(tap.taken.sums)
    for weight, sums in tap.taken.sums.items():
        np.testing.assert_array_equal(short.taken.sums[weight].squares, sums.squares)
        np.testing.assert_array_equal(short.taken.sums[weight].counts, sums.counts)
    assert "output.weight" in tap.taken.sums or "token_embd.weight" in tap.taken.sums
    for sums in tap.taken.sums.values():
        assert np.isfinite(sums.squares).all()
        assert sums.counts.sum() > 0


@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES if not a.has_encoder])
def test_the_table_agrees_with_the_graph_on_what_reads_what(name: str, tmp_path: Path) -> None:
    path = write_small_model(tmp_path / "m.gguf", next(a for a in ARCHITECTURES if a.name == name))
    ids = np.random.default_rng(4).integers(N_VOCAB, size=24, dtype=np.int32)
    with open_gguf(path) as file:
        tied = file.has_tied_embedding
    tap = Tap(_weights(path))
    with LlamaModel(
        path, n_ctx=64, n_threads=1, eval_callback=tap.callback, any_kind=True
    ) as model:
        model.decode(ids)
        tap.check()
    found = tap.taken.sums
    for weight, sums in found.items():
        assert not is_looked_up(weight, tied=tied)
        for other in sharers(weight):
            if other in found:
                np.testing.assert_array_equal(found[other].squares, sums.squares)
    pairs = {(w, o) for w in found for o in sharers(w) if o in found}
    fused = {"phi3", "gpt2", "mamba", "mamba2", "rwkv7"}
    assert bool(pairs) == (name not in fused)


def test_matrices_of_a_weight_take_those_of_the_input_in_turn() -> None:
    x = np.random.default_rng(5).standard_normal((2, 4, 3, 8), np.float32)
    sums = Sums(np.zeros((2, 8)), np.zeros(1, np.int64))
    add_dense(sums, x, (1, 2))
    for number in range(2):
        expected = np.square(x[:, number::2].reshape(-1, 8)).sum(axis=0)
        np.testing.assert_allclose(sums.squares[number], expected, rtol=1e-6)
    assert sums.counts.tolist() == [12]


def test_one_input_for_all_chosen_experts_counts_for_each() -> None:
    x = np.arange(6, dtype=np.float32).reshape(1, 3, 1, 2)
    ids = np.array([[0, 1], [1, 2], [0, 2]], np.int32)[None, None]
    sums = Sums(np.zeros((4, 2)), np.zeros(4, np.int64))
    add_routed(sums, x, ids)
    assert sums.counts.tolist() == [2, 2, 2, 0]
    assert sums.squares.tolist() == [[16, 26], [4, 10], [20, 34], [0, 0]]


@pytest.mark.parametrize(("n_rows", "n"), [(0, 3), (1, 1), (7, 64), (300, 70), (129, 600), (5, 33)])
def test_grams_are_added_up_above_the_diagonal_and_mirrored(n_rows: int, n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n_rows, n), np.float32)
    start = rng.standard_normal((n, n)).astype(np.float32)
    gram = start.copy()
    add_grams([(x, gram)], 1)
    exact = start + x.astype(np.float64).T @ x
    above = np.triu_indices(n)
    np.testing.assert_allclose(gram[above], exact[above], rtol=1e-5, atol=1e-5 * n_rows)
    below = np.tril_indices(n, -1)
    assert np.array_equal(gram[below], start[below])
    mirror(gram)
    assert np.array_equal(gram, gram.T)
    np.testing.assert_allclose(gram[above], exact[above], rtol=1e-5, atol=1e-5 * n_rows)


def test_grams_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        add_grams([(np.zeros((2, 4), np.float32), np.zeros((3, 3), np.float32))], 1)
    with pytest.raises(ValueError, match="do not suit"):
        add_grams([(np.zeros((4, 2), np.float32).T, np.zeros((4, 4), np.float32))], 1)


def test_a_ggml_with_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ctypes.Structure):  # as if a field had come in before the sources
        _fields_ = tuple(
            (name, ctypes.c_void_p if name == "flags" else kind) for name, kind in FIELDS
        )

    ggml.check_layout.cache_clear()
    monkeypatch.setattr(ggml, "Tensor", Other)
    with pytest.raises(EngineError, match="lays out its tensors in another way: the size"):
        ggml.check_layout()
    monkeypatch.undo()
    assert ggml.check_layout().mul_mat > 0


def test_a_field_out_of_place_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = dict(FIELDS)
    swap = {"ne": "nb", "nb": "ne"}
    order = [swap.get(name, name) for name in fields]

    class Swapped(ctypes.Structure):
        _fields_ = tuple((name, fields[name]) for name in order)

    library = ggml.library()
    monkeypatch.setattr(ggml, "Tensor", Swapped)
    pointer = ctypes.POINTER(Swapped)
    with ggml._scratch(library) as memory:
        probes = ggml._Probes(library, memory)
        probes.weight = ctypes.cast(probes.weight, pointer)
        readings = probes._fields("weight", probes.weight, 1, [8, 3, 2, 1])
        what, found, expected = next(r for r in readings if r[1] != r[2])
    assert (what, found, expected) == ("ne of weight", [2, 16, 48, 96], [8, 3, 2, 1])


def test_grams_of_short_decodes_are_those_of_a_long_one(tiny: Path) -> None:
    """Rows are kept until there are 256: what is left is added when the sums are asked for."""
    rng = np.random.default_rng(6)
    ids = rng.integers(3, 250, size=600, dtype=np.int32)
    found = []
    for step in (1, 60, 600):
        tap = Tap(["blk.0.attn_q.weight"], ["blk.0.attn_q.weight"])
        tap.n_threads = 2
        with LlamaModel(tiny, n_ctx=640, n_threads=1, eval_callback=tap.callback) as model:
            for start in range(0, 600, step):
                for begin, end in model.chunks(step):
                    model.decode(ids[start + begin : start + end])
                    tap.check()
        found.append(tap.taken)
    for taken in found:
        (sums,), (gram,) = taken.sums.values(), taken.grams.values()
        assert sums.counts.tolist() == [600]
        np.testing.assert_allclose(np.diag(gram), sums.squares[0], rtol=1e-4)
        np.testing.assert_allclose(gram, found[-1].grams["blk.0.attn_q.weight"], rtol=1e-3, atol=1)


def test_an_error_in_the_callback_is_raised_after_the_decode(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    tap = Tap(_weights(tiny))
    monkeypatch.setattr(tap, "_take", fail)
    with LlamaModel(tiny, n_ctx=64, n_threads=1, eval_callback=tap.callback) as model:
        model.decode(np.arange(10, dtype=np.int32))
        with pytest.raises(RuntimeError, match="out of order"):
            tap.check()


def test_the_file_is_read_back_by_us_and_by_gguf(tiny: Path, tmp_path: Path) -> None:
    path, hessian = tmp_path / "i.gguf", tmp_path / "h.gguf"
    found = ramgguf.calibrate(
        tiny, path, tokens="self", n_sequences=2, n_ctx=32, seed=3, hessian=hessian, threads=1
    )
    assert (found.n_entries, found.n_tokens, found.missed) == (
        15,
        64,
        (),
    )  # the embedding is looked up
    imatrix = load_imatrix(path)
    assert imatrix.datasets == ("self-drawn tokens, seed 3",)
    assert (imatrix.n_chunks, len(imatrix.entries)) == (2, 15)
    reader = GGUFReader(path)
    assert reader.fields["imatrix.chunk_size"].contents() == 32
    tensors = {t.name: t.data for t in reader.tensors}
    hessians = load_hessians(hessian)
    assert hessians.n_tokens == 64
    for name, entry in imatrix.entries.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert counts.tolist() == [[64]]
        np.testing.assert_array_equal(entry.values, sums / np.float32(64))
        gram = hessians.get(name, sums.shape[1])
        assert gram is not None
        np.testing.assert_allclose(np.diag(gram), sums[0], rtol=1e-4)
    hessians.close()


@pytest.mark.parametrize("tokens", ["random", "self"])
def test_hessians_taken_in_batches_are_the_same(tiny: Path, tmp_path: Path, tokens: str) -> None:
    paths = [tmp_path / "one.gguf", tmp_path / "batches.gguf"]
    shown = ShownStages()
    for path, n_bytes in zip(paths, (1 << 30, 4 * 128 * 128 + 4 * 64 * 64), strict=True):
        ramgguf.calibrate(
            tiny, path.with_suffix(".imatrix"), tokens=tokens, n_sequences=2, n_ctx=32,
            hessian=path, max_gram_bytes=n_bytes, threads=1, progress=shown,
        )  # fmt: skip
    passes = [then for stage, *then in shown.stages if stage == "calibrate"]
    left = [f"{n} pass{'es' * (n > 1)} for Hessians" for n in range(len(passes) - 2, 0, -1)]
    assert passes == [[], *([name] for name in left), []]
    if tokens == "random":
        assert paths[0].read_bytes() == paths[1].read_bytes()
    # The model's own tokens are drawn for the first batch and read for the others.
    one, batches = ({t.name: t.data for t in GGUFReader(p).tensors} for p in paths)
    assert set(one) == set(batches)
    for name, gram in one.items():
        np.testing.assert_allclose(gram, batches[name], rtol=0.02, atol=0.01 * np.abs(gram).max())


def test_hessians_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="leave that weight out"):
        ramgguf.calibrate(
            tiny, tmp_path / "x", n_sequences=1, n_ctx=32, hessian=tmp_path / "y",
            max_gram_bytes=100, threads=1,
        )  # fmt: skip
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_groups_fill_the_memory_and_never_more() -> None:
    sizes = {"a": 10, "b": 10, "c": 20, "d": 5}
    assert groups(sizes, 800) == [("a", "b"), ("c",), ("d",)]
    assert groups(sizes, 1600) == [("a", "b"), ("c",), ("d",)]
    assert groups(sizes, 10**6) == [("a", "b", "c", "d")]


def test_llama_cpp_quantizes_with_the_matrix_as_we_read_it(tiny: Path, tmp_path: Path) -> None:
    """What llama_model_quantize writes with the entries of our file is other than without."""
    from llama_quantize import quantize

    path = tmp_path / "i.gguf"
    ramgguf.calibrate(tiny, path, n_sequences=1, n_ctx=32, threads=1)
    plain = quantize(tiny, tmp_path / "plain.gguf", "Q4_1", threads=1)
    weighed = quantize(tiny, tmp_path / "weighed.gguf", "Q4_1", imatrix=path, threads=1)
    reader = GGUFReader(weighed)
    assert reader.fields["quantize.imatrix.entries_count"].contents() == 15
    blocks = {t.name: t.data for t in reader.tensors}
    name = "blk.0.ffn_down.weight"
    before = {t.name: t.data for t in GGUFReader(plain).tensors}[name]
    assert not np.array_equal(blocks[name], before)


def test_an_interrupted_run_leaves_no_file(tiny: Path, tmp_path: Path) -> None:
    command = [RAMGGUF, "calibrate", str(tiny), "-o", str(tmp_path / "i.gguf")]
    child = subprocess.Popen(
        [*command, "--tokens", "self", "--sequences", "4000", "-t", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=unwatched(),
    )
    assert child.stderr is not None
    assert "4000 sequences of 512 tokens" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    assert "Traceback" not in child.stderr.read()
    child.stderr.close()
    assert child.wait() == 130
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_output_and_the_next_gives_the_same(
    tiny: Path, tmp_path: Path
) -> None:
    paths = {name: tmp_path / f"{name}.gguf" for name in ("whole", "killed")}
    options = ["--sequences", "400", "--context", "64", "-t", "1"]
    command = [RAMGGUF, "calibrate", str(tiny), *options, "-o"]
    start = time.perf_counter()
    subprocess.run([*command, str(paths["whole"]), "-q"], check=True, env=unwatched())
    seconds = time.perf_counter() - start
    with subprocess.Popen([*command, str(paths["killed"]), "-q"], env=unwatched()) as child:
        time.sleep(seconds / 2)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not paths["killed"].exists()
    subprocess.run([*command, str(paths["killed"]), "-q"], check=True)
    assert paths["killed"].read_bytes() == paths["whole"].read_bytes()


def test_the_command_says_what_it_found(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    command = [RAMGGUF, "calibrate", str(tiny), "-o", str(path), "--sequences", "1"]
    options = ["--context", "32", "-t", "1", "--tokens", "random"]
    done = subprocess.run([*command, *options, "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout)["n_entries"] == 15
    again = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "--force" in again.stderr


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "nan.gguf", nan_in_output=True)
    with pytest.raises(EngineError, match="logits are NaN"):
        ramgguf.calibrate(
            path, tmp_path / "i.gguf", tokens="self", n_sequences=1, n_ctx=32, threads=1
        )


def test_a_request_before_a_tap_is_an_error(tiny: Path) -> None:
    from ramgguf.llama.protocol import Observe, Observed, pack_ids

    with (
        Engine([tiny], n_ctx=16, n_threads=1) as engine,
        pytest.raises(EngineError, match="no tap"),
    ):
        engine.ask(Observe(ids=pack_ids([1, 2])), Observed)


def test_the_data_set_is_named_after_its_tokens(tiny: Path) -> None:
    with open_gguf(tiny) as file:
        assert dataset_name(parse_sources("random", file), 7) == "random-drawn tokens, seed 7"
        told = dataset_name(parse_sources("self:3,random", file), 8)
    assert told == "self-drawn tokens 75% + random-drawn tokens 25%, seed 8"


def test_sources_share_the_sequences_by_their_weights(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text\n" * 9)
    with open_gguf(tiny) as file:
        sources = parse_sources(f"self,mix,{text}:2", file)
        with pytest.raises(EngineError, match="no such text"):
            parse_sources("self,no such text", file)
        with pytest.raises(EngineError, match="name no source"):
            parse_sources("self:0", file)
    weights = {s.name: s.weight for s in sources}
    assert weights[str(text)] == pytest.approx(0.5)
    assert weights["self"] == pytest.approx(0.25)
    domains = [w for name, w in weights.items() if name not in ("self", str(text))]
    assert len(domains) == 5
    assert sum(domains) == pytest.approx(0.25)
    for n in (1, 7, 12, 64):
        assert sum(shares(sources, n)) == n
    assert shares(sources, 40) == (10, 2, 2, 2, 2, 2, 20)


def test_a_file_s_tag_tells_sources_apart(tiny: Path, tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        (folder / "x.txt").write_text(f"texts of {folder.name}\n" * 9)
    (tmp_path / "mix.txt").write_text("no mix at all\n" * 9)
    first, second = (str(folder / "x.txt") for folder in folders)
    lists = (
        "self", "mix", "random", "self,mix", "self,mix:2", "self:2,mix", str(tmp_path / "mix.txt"),
        first, second, f"{first}:2,self", f"{first},self", f"self,{first}", f"{first},{second}",
    )  # fmt: skip
    with open_gguf(tiny) as file:
        tags = [file_tag(text, file) for text in lists]
        assert len(set(tags)) == len(lists)
        assert tags[:5] == ["self", "mix", "random", "self_mix", "self_mix_2"]
        assert all(re.fullmatch(r"[\w.-]+", tag) for tag in tags)
        (folders[0] / "x.txt").write_text("another text\n" * 9)
        assert file_tag(first, file) != tags[lists.index(first)]


@pytest.mark.parametrize("wrong", [{"n_ctx": 1}, {"n_sequences": 0}, {"n_sequences": -1}])
def test_nothing_to_read_is_an_error_of_the_request(
    tiny: Path, tmp_path: Path, wrong: dict[str, int]
) -> None:
    for call in (
        lambda: ramgguf.calibrate(tiny, tmp_path / "i.gguf", **wrong),  # type: ignore[arg-type]  # any of its numbers
        lambda: ramgguf.sensitivity(tiny, **wrong),  # type: ignore[arg-type]  # any of its numbers
    ):
        with pytest.raises(EngineError, match="is the least"):
            call()


def test_a_calibration_reads_every_source(tiny: Path, tmp_path: Path) -> None:
    alone, mixed = tmp_path / "alone.gguf", tmp_path / "mixed.gguf"
    found = ramgguf.calibrate(tiny, mixed, tokens="random,mix", n_sequences=10, n_ctx=32)
    ramgguf.calibrate(tiny, alone, tokens="random", n_sequences=10, n_ctx=32)
    assert found.n_tokens == 320
    assert found.missed == ()
    a, b = load_imatrix(alone), load_imatrix(mixed)
    assert a.datasets[0] == "random-drawn tokens, seed 0"
    for domain in ("prose", "code", "mathematics", "chat", "languages"):
        assert f"{domain} (calibrate) 10%" in b.datasets[0]
    name = "blk.0.ffn_down.weight"
    assert not np.allclose(a.entries[name].values, b.entries[name].values, rtol=1e-3)


def test_windows_of_a_text_do_not_overlap_while_there_are_new_ones(tiny: Path) -> None:
    corpus = Corpus("numbers", "".join(chr(33 + i * i % 61) for i in range(31 * 6)))
    request = TokenRequest(encoder="rtn", tokens="text", corpus=corpus, n_ctx=32)
    with LlamaModel(tiny, n_ctx=32, n_threads=1) as model:
        whole = model.vocab.tokenize(corpus.bytes, add_special=False)
        n_windows = len(whole) // 31  # "ab" is one token
        drawn = draw_sequences(model, request, range(n_windows))
    windows = {tuple(whole[i * 31 : (i + 1) * 31]) for i in range(n_windows)}
    assert {tuple(ids[1:]) for ids in drawn} == windows
