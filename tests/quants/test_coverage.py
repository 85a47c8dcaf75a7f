"""Which of a model's matrices an importance matrix covers, and what is said where it does not."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

import ramgguf
from gguf_samples import finish_gguf
from imatrix_samples import Floats, floats, legacy, legacy_entry, write_gguf
from ramgguf.core.errors import ImatrixError
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.coverage import Coverage, coverage
from ramgguf.quants.hessian import new_hessians
from ramgguf.quants.imatrix import load_imatrix, plain_name

D, FFN, N_EXPERTS = 256, 512, 3
RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))
SEPARATE = {
    "attn_q": (D, D), "attn_k": (D, D), "attn_v": (D, D), "attn_output": (D, D),
    "ffn_gate": (FFN, D), "ffn_up": (FFN, D), "ffn_down": (D, FFN),
}  # fmt: skip
FUSED = {
    "attn_qkv": (3 * D, D), "attn_output": (D, D), "ffn_gate_up": (2 * FFN, D),
    "ffn_down": (D, FFN),
}  # fmt: skip
EXPERTS = {
    "ffn_gate_exps": (N_EXPERTS, FFN, D), "ffn_up_exps": (N_EXPERTS, FFN, D),
    "ffn_down_exps": (N_EXPERTS, D, FFN),
}  # fmt: skip
FUSED_EXPERTS = {"ffn_gate_up_exps": (N_EXPERTS, 2 * FFN, D)}

Shapes = Mapping[str, tuple[int, ...]]


def _model(path: Path, parts: Shapes, *, n_layers: int = 2, tied: bool = False) -> Path:
    rng = np.random.default_rng(0)
    out = GGUFWriter(path, "llama")
    out.add_block_count(n_layers)

    def add(name: str, shape: tuple[int, ...]) -> None:
        out.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float16))

    add("token_embd", (64, D))
    if not tied:
        add("output", (64, D))
    for i in range(n_layers):
        out.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(D, np.float32))
        for part, shape in parts.items():
            add(f"blk.{i}.{part}", shape)
    finish_gguf(out)
    return path


def _columns(part: str) -> int:
    return FFN if "ffn_down" in part else D


def _imatrix(path: Path, names: Iterable[str], *, unused: int = 0) -> Path:
    """Return a matrix with entries of these weights; unused experts of each saw no token."""
    rng = np.random.default_rng(1)
    tensors: dict[str, Floats] = {}
    for name in names:
        n = N_EXPERTS if "_exps" in name else 1
        counts = np.ones((n, 1), np.float32)
        if n > 1:
            counts[:unused] = 0
        tensors[f"{name}.in_sum2"] = rng.exponential(1, (n, _columns(name))).astype(np.float32)
        tensors[f"{name}.counts"] = counts
    return write_gguf(path, tensors)


def _names(parts: Iterable[str], n_layers: int = 2) -> list[str]:
    return [f"blk.{i}.{part}.weight" for i in range(n_layers) for part in parts]


def _found(model: Path, imatrix: Path) -> Coverage:
    with open_gguf(model) as file:
        found = coverage(file, load_imatrix(imatrix))
    assert found is not None
    return found


def test_what_is_whole_is_not_spoken_of(tmp_path: Path) -> None:
    model = _model(tmp_path / "m.gguf", SEPARATE)
    found = _found(model, _imatrix(tmp_path / "i.gguf", [*_names(SEPARATE), "output.weight"]))
    assert (found.missing, found.shared, found.notes()) == ((), (), ())
    assert len(found.matrices) == 15  # no norm, and not the embedding: it is looked up


def test_a_tied_embedding_is_a_matrix(tmp_path: Path) -> None:
    model = _model(tmp_path / "m.gguf", SEPARATE, tied=True)
    found = _found(model, _imatrix(tmp_path / "i.gguf", _names(SEPARATE)))
    assert found.missing == ("token_embd.weight",)


def test_every_missing_matrix_is_named_by_its_layers(tmp_path: Path) -> None:
    model = _model(tmp_path / "m.gguf", SEPARATE, n_layers=6)
    names = [n for n in _names(SEPARATE, 6) if not ("ffn_down" in n and n[4] in "0124")]
    names = [n for n in names if n != "blk.3.attn_output.weight"]
    found = _found(model, _imatrix(tmp_path / "i.gguf", [*names, "output.weight"]))
    (note,) = found.notes()
    assert "no entry for 5 of 43 matrices (ffn_down of layers 0–2, 4; attn_output of" in note
    assert "attn_output of layer 3): their" in note


def test_a_matrix_of_half_the_model_is_told_everywhere(tmp_path: Path) -> None:
    model = _model(tmp_path / "m.gguf", SEPARATE)
    imatrix = _imatrix(tmp_path / "i.gguf", _names(SEPARATE, n_layers=1))
    expected = (
        "the importance matrix has no entry for 8 of 15 matrices (output; attn_q, attn_k, attn_v, "
        "attn_output, ffn_gate, ffn_up, ffn_down of layer 1): their errors are not weighed"
    )
    measured = ramgguf.measure(model, imatrix=imatrix, formats=["Q4_0", "Q8_0"])
    assert measured.notes == (expected,)
    weighed = {t.name for t in measured.tensors if t.output_squares is not None}
    assert weighed == set(_names(SEPARATE, n_layers=1))
    plan = ramgguf.plan(measured, "6bpw", min_sqnr_db=0)
    assert expected in plan.notes
    assert expected in ramgguf.curve(measured, min_sqnr_db=0).notes
    for command in (
        ["measure", model, "-o", tmp_path / "c.json"],
        ["quantize", model, "-b", "9bpw", "-o", tmp_path / "o.gguf"],
    ):
        words = [RAMGGUF, *map(str, command), "--imatrix", str(imatrix), "--formats", "Q4_0,Q8_0"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout.count(f"note: {expected}\n") == 1


@pytest.mark.parametrize("names", [_names(["ffn_other"]), ["blk.7.attn_q.weight"]])
def test_a_matrix_of_another_model_is_refused_and_both_are_named(
    tmp_path: Path, names: list[str]
) -> None:
    model, imatrix = _model(tmp_path / "m.gguf", SEPARATE), tmp_path / "i.gguf"
    _imatrix(imatrix, names)
    n = "1 tensor" if len(names) == 1 else "2 tensors"
    message = rf"i\.gguf has entries for {n}, and none of the 15 matrices of .*m\.gguf is among"
    with pytest.raises(ImatrixError, match=message):
        ramgguf.measure(model, imatrix=imatrix)
    with pytest.raises(ImatrixError, match=message):
        ramgguf.quantize(model, "6bpw", tmp_path / "o.gguf", imatrix=imatrix)
    assert not (tmp_path / "o.gguf").exists()


def test_an_entry_for_other_columns_names_both_files(tmp_path: Path) -> None:
    model, imatrix = _model(tmp_path / "m.gguf", SEPARATE), tmp_path / "i.dat"
    imatrix.write_bytes(legacy(legacy_entry("blk.0.attn_q.weight", 1, floats(1, 2))))
    with pytest.raises(ImatrixError, match=r"i\.dat: entry 'blk.0.attn_q.weight' has 2.*m\.gguf"):
        ramgguf.measure(model, imatrix=imatrix)


@pytest.mark.parametrize(
    ("parts", "entries"),
    [
        (SEPARATE, ["attn_q", "ffn_gate"]),
        (SEPARATE, ["attn_v", "ffn_up"]),
        (SEPARATE, ["attn_qkv", "ffn_gate_up"]),
        (FUSED, ["attn_q", "ffn_gate"]),
        (FUSED, ["attn_k", "ffn_up"]),
    ],
)
def test_fused_and_separate_names_serve_each_other(
    tmp_path: Path, parts: Shapes, entries: list[str]
) -> None:
    model = _model(tmp_path / "m.gguf", parts)
    names = [*_names([*entries, "attn_output", "ffn_down"]), "output.weight"]
    path = _imatrix(tmp_path / "i.gguf", names)
    found = _found(model, path)
    assert found.missing == ()
    assert set(found.shared) == set(found.matrices) - set(names)
    imatrix = load_imatrix(path)
    for kind, mine in (("attn_", entries[0]), ("ffn_", entries[1])):
        for part in parts:
            if part.startswith(kind) and part not in ("attn_output", "ffn_down"):
                got = imatrix.importance(f"blk.1.{part}.weight", parts[part][::-1])
                assert got is not None
                want = imatrix.entries[f"blk.1.{mine}.weight"].values
                np.testing.assert_array_equal(got, want)
    measured = ramgguf.measure(model, imatrix=path, formats=["Q4_0"])
    assert all(t.output_squares is not None for t in measured.tensors if t.layer and not t.kept)


@pytest.mark.parametrize(
    ("parts", "entry"), [(EXPERTS, "ffn_gate_up_exps"), (FUSED_EXPERTS, "ffn_up_exps")]
)
def test_experts_serve_each_other_expert_by_expert(
    tmp_path: Path, parts: Shapes, entry: str
) -> None:
    imatrix = load_imatrix(_imatrix(tmp_path / "i.gguf", _names([entry])))
    for part, shape in parts.items():
        got = imatrix.importance(f"blk.0.{part}.weight", shape[::-1])
        if "down" in part:
            assert got is None
        else:
            assert got is not None
            np.testing.assert_array_equal(got, imatrix.entries[f"blk.0.{entry}.weight"].values)


RANK, HEAD, N_HEADS = 64, 32, 3
WHOLE_FACTOR = {"attn_kv_b": (2 * N_HEADS * HEAD, RANK)}
SPLIT_FACTORS = {"attn_k_b": (N_HEADS, RANK, HEAD), "attn_v_b": (N_HEADS, HEAD, RANK)}


def _latent_entry(path: Path, part: str, n_heads: int) -> Path:
    values = np.random.default_rng(2).exponential(1, (n_heads, RANK)).astype(np.float32)
    name = f"blk.0.{part}.weight"
    ones = np.ones((n_heads, 1), np.float32)
    return write_gguf(path, {f"{name}.in_sum2": values, f"{name}.counts": ones})


def test_the_whole_factor_of_latent_attention_weighs_values_and_not_keys(tmp_path: Path) -> None:
    """K's factor is multiplied with queries, and has other columns: nothing is known of these."""
    model = _model(tmp_path / "m.gguf", SPLIT_FACTORS, n_layers=1, tied=True)
    path = _latent_entry(tmp_path / "i.gguf", "attn_kv_b", 1)
    imatrix = load_imatrix(path)
    found = imatrix.importance("blk.0.attn_v_b.weight", SPLIT_FACTORS["attn_v_b"][::-1])
    assert found is not None
    own = imatrix.entries["blk.0.attn_kv_b.weight"].values
    np.testing.assert_array_equal(found, np.repeat(own, N_HEADS, axis=0))
    assert imatrix.importance("blk.0.attn_k_b.weight", SPLIT_FACTORS["attn_k_b"][::-1]) is None
    covered = _found(model, path)
    assert covered.alike == ("blk.0.attn_v_b.weight",)
    assert covered.shared == ()
    assert covered.missing == ("token_embd.weight", "blk.0.attn_k_b.weight")
    missing, alike = covered.notes()
    assert "no entry for 2 of 3 matrices (token_embd; attn_k_b of layer 0)" in missing
    assert alike.endswith("columns: 1 of 3 matrices (attn_v_b of layer 0)")


def test_the_values_factor_weighs_the_whole_one_by_the_mean_over_heads(tmp_path: Path) -> None:
    model = _model(tmp_path / "m.gguf", WHOLE_FACTOR, n_layers=1, tied=True)
    path = _latent_entry(tmp_path / "i.gguf", "attn_v_b", N_HEADS)
    imatrix = load_imatrix(path)
    found = imatrix.importance("blk.0.attn_kv_b.weight", WHOLE_FACTOR["attn_kv_b"][::-1])
    assert found is not None
    own = imatrix.entries["blk.0.attn_v_b.weight"].values
    np.testing.assert_allclose(found, own.mean(axis=0, keepdims=True), rtol=1e-6)
    assert _found(model, path).alike == ("blk.0.attn_kv_b.weight",)


def test_an_entry_of_one_s_own_comes_first_and_others_only_where_they_fit(tmp_path: Path) -> None:
    q, k = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
    path = tmp_path / "i.dat"
    path.write_bytes(legacy(legacy_entry(q, 1, floats(1, 2)), legacy_entry(k, 1, floats(3, 4))))
    imatrix = load_imatrix(path)
    own = imatrix.importance(k, (2, 8))
    assert own is not None
    assert own.tolist() == [[3, 4]]
    v = imatrix.importance("blk.0.attn_v.weight", (2, 8))
    assert v is not None
    assert v.tolist() == [[1, 2]]
    assert imatrix.importance("blk.0.attn_v.weight", (4, 8)) is None
    for other in ("blk.1.attn_v", "blk.0.attn_output", "dec.blk.0.attn_v", "blk.0.cross_attn_v"):
        assert imatrix.importance(f"{other}.weight", (2, 8)) is None


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("blk.0.attn_q.weight", "blk.0.attn_q.weight"),
        ("CUDA0#blk.0.attn_q.weight#0", "blk.0.attn_q.weight"),
        ("Vulkan1#blk.12.ffn_down.weight#3", "blk.12.ffn_down.weight"),
        ("blk.0.attn_kv_b.weight (reshaped)", "blk.0.attn_kv_b.weight"),
        ("blk.0.attn_kv_b.weight (view) (cont)", "blk.0.attn_kv_b.weight"),
        ("a#b", "a#b"),
        ("", ""),
    ],
)
def test_names_that_ggml_gives_to_copies_and_views_are_the_tensor_s(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_an_entry_under_the_name_of_a_copy_is_found(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy(legacy_entry("CUDA0#blk.0.attn_q.weight#0", 1, floats(1, 2))))
    values = load_imatrix(path).importance("blk.0.attn_q.weight", (2, 8))
    assert values is not None
    assert values.tolist() == [[1, 2]]


def test_experts_that_saw_no_token_are_counted(tmp_path: Path) -> None:
    model = _model(tmp_path / "m.gguf", EXPERTS)
    names = [*_names(EXPERTS), "output.weight"]
    found = _found(model, _imatrix(tmp_path / "i.gguf", names, unused=2))
    (note,) = found.notes()
    assert note.startswith("12 experts of 6 tensors saw no token when the matrix was made: each")


def _keys(path: Path) -> set[str]:
    return {k for k in GGUFReader(path).fields if k.startswith("quantize.imatrix.")}


@pytest.mark.parametrize(
    ("encoder", "pins", "used"),
    [
        ("search", [], True),
        ("rtn", [], False),  # it rounds, whatever the importance
        ("search", ["attn=F16"], False),  # only attention has entries, and none is encoded
    ],
)
def test_the_output_names_a_matrix_only_where_it_weighed_what_is_encoded(
    tmp_path: Path, encoder: str, pins: list[str], used: bool
) -> None:
    model = _model(tmp_path / "m.gguf", SEPARATE)
    imatrix = _imatrix(tmp_path / "i.gguf", _names(p for p in SEPARATE if "attn" in p))
    output = tmp_path / "o.gguf"
    made = ramgguf.quantize(
        model, "12bpw", output, imatrix=imatrix, encoder=encoder, pins=pins, min_sqnr_db=0,
        formats=["Q4_0", "Q8_0"],
    )  # fmt: skip
    assert any(a.format != a.source_format for a in made.plan.assignments)
    assert made.plan.imatrix_used == used
    assert bool(_keys(output)) == used
    assert output.stat().st_size == made.n_bytes == made.plan.n_bytes <= made.plan.budget
    assert any("weighs nothing that is encoded" in note for note in made.plan.notes) != used
    again = ramgguf.quantize(model, output=tmp_path / "a.gguf", from_plan=made.plan)
    assert (tmp_path / "a.gguf").read_bytes() == output.read_bytes()
    assert again.plan.notes == made.plan.notes


def _hessians(path: Path, names: Iterable[str]) -> Path:
    sizes = {name: _columns(name) for name in names}
    with new_hessians(
        path, {n: n for n in sizes}, sizes, 1, model_sample="x" * 64, force=True
    ) as out:
        for name, n in sizes.items():
            out.write(f"{name}.gram", np.eye(n, dtype=np.float32))
        out.commit()
    return path


def test_hessians_that_are_missing_are_told_and_those_of_sharers_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tmp_path / "m.gguf", SEPARATE)
    every = [*_names(SEPARATE), "output.weight"]
    imatrix = _imatrix(tmp_path / "i.gguf", every)
    with open_gguf(model) as file:
        sample = file.sample_sha256
    hessian = _hessians(tmp_path / "h.gguf", _names(["attn_q", "ffn_down"]))
    data = hessian.read_bytes().replace(b"x" * 64, sample.encode())
    hessian.write_bytes(data)
    measured = ramgguf.measure(
        model, imatrix=imatrix, hessian=hessian, formats=["Q4_0"], encoder="gptq"
    )
    (note,) = measured.notes
    assert note.startswith("there is no Hessian for 7 of 15 matrices (output; attn_output, ffn_g")
    assert note.endswith("ffn_up of layers 0–1): their errors are not those of the output")
    nothing = _hessians(tmp_path / "n.gguf", ["blk.9.attn_q.weight"])
    nothing.write_bytes(nothing.read_bytes().replace(b"x" * 64, sample.encode()))
    with pytest.raises(ImatrixError, match=r"n\.gguf has a Hessian for none of the 15 matrices"):
        ramgguf.measure(model, imatrix=imatrix, hessian=nothing, formats=["Q4_0"])
