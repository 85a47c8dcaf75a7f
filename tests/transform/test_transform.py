"""Scales leave what a model computes, and make its quantization better."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import ramgguf
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError, ImatrixError, PlanError
from ramgguf.core.progress import Silent
from ramgguf.gguf.architecture import is_multiplied
from ramgguf.gguf.folds import ARCHITECTURES as FOLDED
from ramgguf.gguf.folds import folds
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.gguf.writer import rewrite
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import Hessian, load_hessians
from ramgguf.quants.imatrix import InputSquares, load_imatrix, write_imatrix
from ramgguf.quants.scales import ScaledFile, load_scales
from ramgguf.transform import scaling
from small_models import ARCHITECTURES, write_small_model
from tiny_models import write_tiny_model


def _matrix(model: Path, path: Path, spread: float = 2.0) -> Path:
    """Write a matrix in which inputs differ by orders of magnitude, at random."""
    rng = np.random.default_rng(5)
    with open_gguf(model) as file:
        entries = {
            t.name: InputSquares(
                np.exp(spread * rng.standard_normal((1, t.row_length))), np.array([1])
            )
            for t in file.tensors
            if is_multiplied(t.name, t.shape, file.architecture, tied=file.has_tied_embedding)
        }
    write_imatrix(path, entries, dataset="made", n_chunks=1, chunk_size=1, force=True)
    return path


def _weights(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensor(name)
    rows = file.read_rows(tensor, 0, tensor.n_rows)
    return decode_rows(tensor.type_name, rows, tensor.row_length)


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a.name in FOLDED], ids=lambda a: a.name
)
def test_the_scaled_model_computes_the_same_in_llama_cpp(
    architecture: object, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    model = write_small_model(tmp_path / "m.gguf", architecture, tokenizer=True)  # type: ignore[arg-type]
    imatrix = _matrix(model, tmp_path / "i.gguf")
    found = ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=1)
    scales = load_scales(found.path)
    assert max(float(s.max()) for s in scales.columns.values()) > 2
    assert found.kld is not None
    assert found.kld < 1e-5
    with open_gguf(model) as file:
        expected = 4 if any(t.name.endswith("ffn_gate.weight") for t in file.tensors) else 3
        assert found.n_folds == expected * (file.n_layers or 0)


def test_a_scale_that_is_moved_wrongly_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix = _matrix(model, tmp_path / "i.gguf")

    def wrong(file: GGUFFile) -> tuple[object, ...]:
        return tuple(f for f in folds(file) if "ffn_down" not in f.readers[0])[:1] + tuple(
            type(f)(f.writers, f.readers, f.row_of[::-1].copy())
            for f in folds(file)
            if "ffn_down" in f.readers[0]
        )

    monkeypatch.setattr(scaling, "folds", wrong)
    with pytest.raises(PlanError, match="computes something else"):
        ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=1)
    assert not (tmp_path / "s.gguf").exists()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_scales_are_those_of_the_formula(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix = _matrix(model, tmp_path / "i.gguf", spread=0.5)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=0.8, check=False)
    scales, weighed = load_scales(tmp_path / "s.gguf"), load_imatrix(imatrix)
    with open_gguf(model) as file:
        down = "blk.1.ffn_down.weight"
        squares = (_weights(file, down).astype(np.float64) ** 2).sum(axis=0)
        expected = (weighed.entries[down].values[0] ** 0.8 / squares) ** (1 / 4)
        expected /= np.exp(np.log(expected).mean())
        assert np.allclose(scales.columns[down], expected, rtol=1e-5)
        up = "blk.1.ffn_up.weight"
        assert np.allclose(scales.rows[up], 1 / expected, rtol=1e-5)
        # Up is scaled by what it reads, as well.
        assert np.allclose(scales.columns[up], scales.columns["blk.1.ffn_gate.weight"])
        norm = scales.columns["blk.1.ffn_norm.weight"]
        assert np.allclose(norm * scales.columns[up], 1, rtol=1e-5)


def test_heads_that_share_a_v_share_its_scales(tmp_path: Path) -> None:
    llama = next(a for a in ARCHITECTURES if a.name == "llama")
    model = write_small_model(tmp_path / "m.gguf", llama)
    with open_gguf(model) as file:
        fold = next(f for f in folds(file) if f.readers == ("blk.0.attn_output.weight",))
    # Four heads of 64, two of K and V: heads 0 and 1 read the first.
    assert fold.n_rows == 128
    assert fold.row_of[[0, 63, 64, 127, 128, 255]].tolist() == [0, 63, 0, 63, 64, 127]


def test_files_are_read_with_their_scales_and_hessians_are_of_the_scaled_inputs(
    tmp_path: Path,
) -> None:
    pytest.importorskip("llama_cpp")
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix, hessian = tmp_path / "i.gguf", tmp_path / "h.gguf"
    ramgguf.calibrate(model, imatrix, tokens="mix", n_sequences=2, n_ctx=64, hessian=hessian)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    scales = load_scales(tmp_path / "s.gguf")
    plain, scaled = load_imatrix(imatrix), load_imatrix(imatrix, hessian, scales.path)
    with open_gguf(model) as file:
        other = ScaledFile(file, scales)
        for name in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight"):
            tensor, s = file.tensor(name), scales.of_inputs(name)
            assert s is not None
            rows = scales.rows.get(name, np.ones(tensor.n_rows, np.float32))
            w = _weights(file, name)
            expected = (w * s * rows[:, None]).astype(np.float16).astype(np.float32)
            assert np.allclose(_weights(other, name), expected, rtol=2e-3, atol=1e-7)
            part = other.read_rows(tensor, 3, 9)
            assert np.array_equal(
                decode_rows("F16", part, tensor.row_length), _weights(other, name)[3:9]
            )
            before = plain.importance(name, tensor.shape)
            after = scaled.importance(name, tensor.shape)
            assert before is not None
            assert after is not None
            assert np.allclose(after, before / s**2, rtol=1e-5)
            gram = load_hessians(hessian).get(name, tensor.row_length)
            assert gram is not None
            assert scaled.hessians is not None
            found = scaled.hessians.factored(name, tensor.row_length)
            h = Hessian.of(gram, load_hessians(hessian).n_tokens)
            # The output's error is the same, whichever side the scales are on.
            e = np.random.default_rng(1).standard_normal((4, tensor.row_length)).astype(np.float32)
            assert np.allclose(found.errors(e * s), h.errors(e), rtol=1e-3)
            assert np.allclose(found.damped_errors(e * s), h.damped_errors(e), rtol=1e-3)
        assert other.sample_sha256 == file.sample_sha256
    assert scaled.source.identity == load_imatrix(imatrix, hessian).source.identity
    assert scaled.source.encoding != scaled.source.identity


def test_a_file_quantized_with_scales_is_planned_verified_and_made_again(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix = _matrix(model, tmp_path / "i.gguf")
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    made = ramgguf.quantize(
        model, "50%", tmp_path / "a.gguf", imatrix=imatrix, scales=tmp_path / "s.gguf"
    )
    assert made.worst_departure is not None
    assert made.worst_departure < 1e-4
    assert made.plan.imatrix is not None
    assert made.plan.imatrix.scales_path == str(tmp_path / "s.gguf")
    again = ramgguf.quantize(model, None, tmp_path / "b.gguf", from_plan=made.plan)
    assert again.paths[0].read_bytes() == made.paths[0].read_bytes()
    with pytest.raises(PlanError, match="without scales"):
        ramgguf.perturb(model, made.plan, tmp_path / "noisy.gguf")
    without = ramgguf.quantize(model, "50%", tmp_path / "c.gguf", imatrix=imatrix)
    assert without.plan.sha256() != made.plan.sha256()
    norm = "blk.0.attn_norm.weight"
    with open_gguf(model) as file, open_gguf(made.paths[0]) as out:
        scales = load_scales(tmp_path / "s.gguf")
        expected = _weights(file, norm) * scales.columns[norm]
        assert np.allclose(_weights(out, norm), expected, rtol=1e-6)


def test_a_model_whose_columns_differ_in_size_loses_less_with_scales(tmp_path: Path) -> None:
    """Columns are made unlike, inputs divided: scales find their way back."""
    even = write_tiny_model(tmp_path / "even-f16.gguf", weight_type="F16")
    ramgguf.transform(
        even,
        tmp_path / "moved.gguf",
        _matrix(even, tmp_path / "i.gguf", 3.0),
        strength=1,
        check=False,
    )
    moved = load_scales(tmp_path / "moved.gguf")
    model, imatrix = tmp_path / "uneven-f16.gguf", tmp_path / "j.gguf"
    with open_gguf(even) as file:
        scaled = ScaledFile(file, moved)
        layout = plan_layout(model, file, {t.name: t.type_name for t in file.tensors}, {})
        rewrite(layout, scaled, lambda _, rows: rows, stage="", threads=1, progress=Silent())
    entries = {
        name: InputSquares(1 / s[None].astype(np.float64) ** 2, np.array([1]))
        for name, s in moved.columns.items()
        if "norm" not in name
    }
    write_imatrix(imatrix, entries, dataset="made", n_chunks=1, chunk_size=1, force=True)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=1, check=False)
    back = load_scales(tmp_path / "s.gguf")
    for name in entries:
        product = back.columns[name] * moved.columns[name]
        assert (
            np.abs(np.log(product / product.mean())).max()
            < 0.5 * np.abs(np.log(moved.columns[name])).max()
        )
    errors = []
    for scales in (None, tmp_path / "s.gguf"):
        made = ramgguf.quantize(
            model, "6bpw", tmp_path / f"{scales is None}.gguf", imatrix=imatrix, scales=scales,
            formats=["Q4_0"], pins=["blk=Q4_0"],
        )  # fmt: skip
        errors.append([a.nmse for a in made.plan.assignments if a.name in entries])
    assert len(errors[0]) == 14
    ratios = np.array(errors[1]) / np.array(errors[0])
    assert np.exp(np.mean(np.log(ratios))) < 0.8


def test_what_cannot_be_scaled_is_refused_by_name(tmp_path: Path) -> None:
    mamba = next(a for a in ARCHITECTURES if a.name == "mamba")
    other = write_small_model(tmp_path / "mamba.gguf", mamba)
    imatrix = _matrix(other, tmp_path / "i.gguf")
    with pytest.raises(PlanError, match="no scale can move in it: of the architecture mamba"):
        ramgguf.transform(other, tmp_path / "s.gguf", imatrix)
    quantized = write_tiny_model(tmp_path / "q8.gguf", weight_type="Q8_0")
    with pytest.raises(PlanError, match="no scale can move"):
        ramgguf.transform(quantized, tmp_path / "s.gguf", _matrix(quantized, tmp_path / "j.gguf"))
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix = _matrix(model, tmp_path / "k.gguf")
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    with pytest.raises(GGUFError, match="exists"):
        ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    sibling = write_tiny_model(tmp_path / "sibling.gguf", weight_type="F16", seed=7)
    with pytest.raises(GGUFError, match="of another model"):
        ramgguf.quantize(sibling, "50%", imatrix=imatrix, scales=tmp_path / "s.gguf")
    with pytest.raises(ImatrixError, match="scales need the importance matrix"):
        ramgguf.quantize(model, "50%", scales=tmp_path / "s.gguf")
    with pytest.raises(ImatrixError, match=r"general\.type"):
        load_scales(imatrix)
    with pytest.raises(PlanError, match="strength"):
        ramgguf.transform(model, tmp_path / "t.gguf", imatrix, strength=-1)


def test_scales_that_were_changed_since_the_plan_are_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix, scales = _matrix(model, tmp_path / "i.gguf"), tmp_path / "s.gguf"
    ramgguf.transform(model, scales, imatrix, check=False)
    made = ramgguf.quantize(model, "50%", tmp_path / "a.gguf", imatrix=imatrix, scales=scales)
    ramgguf.transform(model, scales, imatrix, check=False, strength=1, force=True)
    with pytest.raises(ImatrixError, match=r"s\.gguf: is another file"):
        ramgguf.quantize(model, None, tmp_path / "b.gguf", from_plan=made.plan)


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix = _matrix(model, tmp_path / "i.gguf")
    arguments = ["transform", str(model), "--imatrix", str(imatrix), "--no-check", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert Path(said["path"]) == tmp_path / "tiny-f16.scales.gguf"
    assert said["n_folds"] == 8
    quantize = ["quantize", str(model), "--budget", "50%", "--imatrix", str(imatrix)]
    done = CliRunner().invoke(app, [*quantize, "--scales", said["path"], "--no-score", "-q"])
    assert done.exit_code == 0, done.output
