"""Plans whose errors are weighed by activations: in one command, and step by step."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ramgguf
from ramgguf import _core
from ramgguf.core.errors import ImatrixError, PlanError
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.plan.input_rounding import added_nmse
from ramgguf.plan.priors import ModelShape, prior
from ramgguf.plan.result import Plan
from ramgguf.quants import formats
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import load_imatrix
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")

RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))
FORMATS = ("Q4_0", "Q5_0", "Q8_0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("calibrated") / "tiny.gguf", weight_type="F16")


@pytest.fixture(scope="module")
def files(model: Path) -> tuple[Path, Path]:
    imatrix, hessian = model.with_suffix(".i.gguf"), model.with_suffix(".h.gguf")
    ramgguf.calibrate(model, imatrix, n_sequences=4, n_ctx=64, hessian=hessian, threads=1)
    return imatrix, hessian


def _run(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run([RAMGGUF, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def _output_error(file: GGUFFile, written: GGUFFile, name: str, gram: np.ndarray) -> float:
    """Return Σ eHeᵀ / Σ wHwᵀ of a tensor, computed here from both files."""
    values = []
    for source in (file, written):
        tensor = source.tensor(name)
        rows = source.read_rows(tensor, 0, tensor.n_rows)
        out = np.empty((tensor.n_rows, tensor.row_length), np.float32)
        from ramgguf import _core

        _core.decode(tensor.type_name, rows, out)
        values.append(out.astype(np.float64))
    before, after = values
    error = before - after
    return float(((error @ gram) * error).sum() / ((before @ gram) * before).sum())


@pytest.mark.parametrize("encoder", ["search", "gptq"])
def test_the_planned_error_is_that_of_the_outputs(
    model: Path, files: tuple[Path, Path], encoder: EncoderName, tmp_path: Path
) -> None:
    made = ramgguf.quantize(
        model, "6bpw", tmp_path / "q.gguf", encoder=encoder, imatrix=files[0], hessian=files[1],
        formats=FORMATS, threads=1,
    )  # fmt: skip
    assert made.worst_departure is not None
    assert made.worst_departure < 1e-9
    imatrix = load_imatrix(*files)
    assert imatrix.hessians is not None
    quantized = [a for a in made.plan.assignments if a.format in FORMATS]
    assert len(quantized) >= 14
    with open_gguf(model) as file, open_gguf(made.paths[0]) as written:
        for a in quantized:
            if a.name == "token_embd.weight":
                continue
            gram = imatrix.hessians.get(a.name, file.tensor(a.name).row_length)
            assert gram is not None
            found = _output_error(file, written, a.name, gram.astype(np.float64))
            assert found == pytest.approx(a.nmse, rel=1e-4)


def test_error_feedback_takes_the_formats_of_the_searched_plan(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    searched = ramgguf.quantize(
        model, "6bpw", tmp_path / "s.gguf", imatrix=files[0], formats=FORMATS, threads=1
    )
    fed = ramgguf.quantize(
        model, "6bpw", tmp_path / "g.gguf", encoder="gptq", imatrix=files[0], hessian=files[1],
        formats=FORMATS, threads=1,
    )  # fmt: skip
    pairs = list(zip(searched.plan.assignments, fed.plan.assignments, strict=True))
    assert all((a.format, a.cost) == (b.format, b.cost) for a, b in pairs)
    changed = [(a, b) for a, b in pairs if a.format != a.source_format]
    assert sum(a.nmse != b.nmse for a, b in changed) >= 15
    assert fed.plan.encoder == "gptq"
    assert fed.plan.imatrix == load_imatrix(*files).source
    assert any("error feedback" in note for note in fed.plan.notes)
    assert fed.worst_departure is not None
    assert fed.worst_departure < 1e-9
    assert fed.paths[0].read_bytes() != searched.paths[0].read_bytes()
    # Its plan stands by itself.
    again = ramgguf.quantize(model, from_plan=fed.plan, output=tmp_path / "a.gguf", threads=1)
    assert again.paths[0].read_bytes() == fed.paths[0].read_bytes()


def test_error_feedback_comes_after_refinement(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    made = {}
    ways: tuple[tuple[EncoderName, Path | None], ...] = (("search", None), ("gptq", files[1]))
    for encoder, hessian in ways:
        made[encoder] = ramgguf.quantize(
            model, "40%", tmp_path / f"{encoder}.gguf", encoder=encoder, imatrix=files[0],
            hessian=hessian, formats=FORMATS, objective="ram", refine=48, threads=1,
        )  # fmt: skip
    searched, fed = made["search"].plan, made["gptq"].plan
    assert searched.refinement is not None
    assert searched.refinement.swaps
    assert fed.refinement is not None
    assert fed.refinement.swaps == searched.refinement.swaps
    assert [a.format for a in fed.assignments] == [a.format for a in searched.assignments]
    assert fed.encoder == "gptq"
    changed = [
        (a, b)
        for a, b in zip(searched.assignments, fed.assignments, strict=True)
        if a.format != a.source_format
    ]
    assert sum(a.nmse != b.nmse for a, b in changed) >= 15
    assert made["gptq"].worst_departure is not None
    assert made["gptq"].worst_departure < 1e-9
    assert made["gptq"].n_bytes == made["search"].n_bytes <= fed.budget
    again = ramgguf.quantize(model, from_plan=fed, output=tmp_path / "a.gguf", threads=1)
    assert again.paths[0].read_bytes() == made["gptq"].paths[0].read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_error_feedback_lowers_the_outputs_error(model: Path, files: tuple[Path, Path]) -> None:
    def errors(encoder: EncoderName) -> dict[str, float]:
        found = ramgguf.measure(
            model, encoder=encoder, imatrix=files[0], hessian=files[1], formats=["Q4_0"], threads=1
        )
        return {t.name: p.nmse for t in found.tensors for p in t.points if p.format == "Q4_0"}

    search, gptq = errors("search"), errors("gptq")
    lower = [gptq[name] < search[name] for name in search if name != "token_embd.weight"]
    assert len(lower) == 15
    assert sum(lower) >= 13


def test_a_tensor_without_a_hessian_is_searched(model: Path, files: tuple[Path, Path]) -> None:
    imatrix = load_imatrix(*files)
    with open_gguf(model) as file:
        tensor = file.tensor("token_embd.weight")
        rows = file.read_rows(tensor, 0, tensor.n_rows)
        scale = ErrorWeights.of(tensor, imatrix)
        assert scale.hessian is None
        made = [
            scale.encode("Q4_0", "F16", rows, 0, tensor.row_length, encoder)
            for encoder in ("gptq", "search")
        ]
    assert np.array_equal(made[0], made[1])
    assert made[0].shape[1] == formats.row_bytes("Q4_0", tensor.row_length)


def test_one_flag_calibrates_and_weighs(model: Path, tmp_path: Path) -> None:
    ours = tmp_path / "m.gguf"
    ours.write_bytes(model.read_bytes())
    text = tmp_path / "notes.txt"
    text.write_text("the cat sat on the mat, and then it ran away. " * 120)
    said = _run(
        "quantize", ours, "-b", "6bpw", "--calibrate", text, "--save-plan", tmp_path / "p.json",
        "--formats", "Q4_0,Q5_0,Q8_0", "-o", tmp_path / "q.gguf", "-t", "1",
    )  # fmt: skip
    assert "every tensor decoded again: errors as planned" in said
    plan = Plan.load(tmp_path / "p.json")
    assert plan.imatrix is not None
    kept = Path(plan.imatrix.path)
    assert kept.parent == tmp_path
    assert re.fullmatch(r"m\.notes\.txt-[0-9a-f]{8}\.imatrix\.gguf", kept.name)
    assert plan.imatrix.dataset == "notes.txt, seed 0"
    again = _run(
        "quantize", ours, "-b", "6bpw", "--calibrate", text, "--formats", "Q4_0,Q5_0,Q8_0",
        "-o", tmp_path / "again.gguf", "-t", "1",
    )  # fmt: skip
    assert "remove it to calibrate anew" in again
    assert (tmp_path / "q.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_sensitivities_follow_the_error_that_is_weighed(
    model: Path, files: tuple[Path, Path]
) -> None:
    measured = ramgguf.sensitivity(model, n_sequences=1, threads=1)
    same = ramgguf.reweigh(measured, model, None)
    assert same.sha256() == measured.sha256()
    weighed = ramgguf.reweigh(measured, model, files[0])
    for before, after in zip(measured.tensors, weighed.tensors, strict=True):
        assert before.reading is not None
        assert after.reading is not None
        assert after.reading.kld == before.reading.kld
    errors = {t.name: t.reading.nmse for t in weighed.tensors if t.reading}
    found = ramgguf.measure(model, imatrix=files[0], formats=["Q4_0"], threads=1)
    expected = {t.name: p.nmse for t in found.tensors for p in t.points if p.format == "Q4_0"}
    assert errors.keys() == expected.keys()
    # A reading's errors are those of the unweighted encoder, so they are somewhat larger.
    ratios = np.array([errors[n] / expected[n] for n in errors if n != "token_embd.weight"])
    assert 1.0 < np.median(ratios) < 1.3
    plan = ramgguf.plan(found, "8bpw", sensitivity=weighed, min_sqnr_db=0)
    assert plan.objective == "posterior"
    with pytest.raises(PlanError, match="errors weighed differently"):
        ramgguf.plan(found, "8bpw", sensitivity=measured, min_sqnr_db=0)


def test_a_sensitivity_can_be_measured_with_the_matrix(
    model: Path, files: tuple[Path, Path]
) -> None:
    measured = ramgguf.sensitivity(model, n_sequences=1, imatrix=files[0], threads=1)
    assert measured.imatrix is not None
    found = ramgguf.measure(model, imatrix=files[0], formats=["Q4_0"], threads=1)
    expected = {t.name: p.nmse for t in found.tensors for p in t.points if p.format == "Q4_0"}
    for t in measured.tensors:
        assert t.reading is not None
        # Readings are of weights rounded to F16 after they were decoded.
        assert t.reading.nmse == pytest.approx(expected[t.name], rel=2e-3)


def test_a_matrix_of_another_model_is_refused_before_any_pass(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    twin = write_tiny_model(tmp_path / "tiny.gguf", weight_type="F16", noise=0.01)
    with pytest.raises(ImatrixError, match=r"i\.gguf was made from another model than .*tiny"):
        ramgguf.sensitivity(twin, n_sequences=1, imatrix=files[0], threads=1)
    measured = ramgguf.sensitivity(twin, n_sequences=1, threads=1)
    with pytest.raises(ImatrixError, match=r"i\.gguf was made from another model than .*tiny"):
        ramgguf.reweigh(measured, twin, files[0])


def test_the_objective_output_weighs_by_the_outputs_size(
    model: Path, files: tuple[Path, Path]
) -> None:
    found = ramgguf.measure(model, imatrix=files[0], formats=FORMATS, threads=1)
    plan = ramgguf.plan(found, "6bpw", objective="output")
    tensors = {t.name: t for t in found.tensors}
    for a in plan.assignments:
        squares = tensors[a.name].output_squares
        if squares is None:
            squares = tensors[a.name].sum_squares / (a.n_weights // tensors[a.name].row_length)
        assert a.cost == pytest.approx(squares * a.nmse)
    plain = ramgguf.measure(model, formats=FORMATS, threads=1)
    with pytest.raises(PlanError, match="needs errors that an importance matrix weighs"):
        ramgguf.plan(plain, "6bpw", objective="output")


@pytest.mark.parametrize("with_hessians", [False, True])
def test_priors_get_the_errors_of_the_weights_by_themselves(
    model: Path, files: tuple[Path, Path], tmp_path: Path, with_hessians: bool
) -> None:
    """Importance weighs the encoder, and the objectives that are made for weighed errors."""
    hessian = files[1] if with_hessians else None
    names = [*FORMATS, "IQ3_XXS"] if not with_hessians else FORMATS
    found = ramgguf.measure(model, imatrix=files[0], hessian=hessian, formats=names, threads=1)
    plan = ramgguf.plan(found, "6bpw", objective="nmse", min_sqnr_db=0)
    made = ramgguf.quantize(
        model, from_plan=plan, output=tmp_path / "q.gguf", verify=False, threads=1
    )
    points = {(t.name, p.format): p for t in found.tensors for p in t.points}
    with open_gguf(model) as before, open_gguf(made.paths[0]) as after:
        for a in plan.assignments:
            point = points[a.name, a.format]
            assert a.nmse == point.nmse
            assert a.cost == pytest.approx(a.n_weights * point.unweighted)
            if a.format == a.source_format or not formats.get(a.format).encodable:
                continue
            x, q = before.tensor(a.name), after.tensor(a.name)
            rows = before.read_rows(x, 0, x.n_rows), after.read_rows(q, 0, q.n_rows)
            stats = _core.compare(x.type_name, rows[0], q.type_name, rows[1])
            expected = stats.errors[0].sum_squared_error / stats.sum_squares
            assert point.unweighted == pytest.approx(expected, rel=1e-9)
    weighed = [p for p in points.values() if p.plain_nmse is not None and p.nmse]
    assert any(p.plain_nmse != p.nmse for p in weighed)
    relative = ramgguf.plan(found, "6bpw", objective="activation", min_sqnr_db=0)
    tensors = {t.name: t for t in found.tensors}
    shape = ModelShape.of(found)
    for a in relative.assignments:
        tensor = tensors[a.name]
        loss = a.nmse + added_nmse(tensor, points[a.name, a.format])
        assert a.cost == pytest.approx(a.n_weights * prior(tensor, shape) * loss)


def test_gptq_asks_for_hessians(model: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(PlanError, match="needs Hessians"):
        ramgguf.measure(model, encoder="gptq", imatrix=files[0])
    with pytest.raises(ImatrixError, match="need the importance matrix"):
        ramgguf.measure(model, hessian=files[1])


def test_a_plan_with_another_hessian_is_refused(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    hessian = tmp_path / "h.gguf"
    hessian.write_bytes(files[1].read_bytes())
    found = ramgguf.measure(
        model, encoder="gptq", imatrix=files[0], hessian=hessian, formats=FORMATS, threads=1
    )
    plan = ramgguf.plan(found, "6bpw")
    ramgguf.calibrate(
        model, tmp_path / "i.gguf", n_sequences=1, n_ctx=32, hessian=hessian, force=True, threads=1
    )
    with pytest.raises(ImatrixError, match=r"h\.gguf: is another file"):
        ramgguf.quantize(model, from_plan=plan, output=tmp_path / "q.gguf", threads=1)


def test_noise_is_as_large_as_the_errors_row_by_row(model: Path, tmp_path: Path) -> None:
    plan = ramgguf.plan(ramgguf.measure(model, formats=FORMATS, threads=1), "6bpw")
    first = ramgguf.perturb(model, plan, tmp_path / "a.gguf", seed=1, threads=1)
    quantized = ramgguf.quantize(model, from_plan=plan, output=tmp_path / "q.gguf", threads=1)
    from ramgguf import _core

    def values(file: GGUFFile, name: str) -> np.ndarray:
        tensor = file.tensor(name)
        out = np.empty((tensor.n_rows, tensor.row_length), np.float32)
        _core.decode(tensor.type_name, file.read_rows(tensor, 0, tensor.n_rows), out)
        return out.astype(np.float64)

    with (
        open_gguf(model) as file,
        open_gguf(first) as noisy,
        open_gguf(quantized.paths[0]) as small,
    ):
        for a in plan.assignments:
            if a.format == a.source_format:
                tensor = file.tensor(a.name)
                assert np.array_equal(
                    file.read_rows(tensor, 0, tensor.n_rows),
                    noisy.read_rows(noisy.tensor(a.name), 0, tensor.n_rows),
                )
                continue
            assert noisy.tensor(a.name).type_name == "F32"
            before = values(file, a.name)
            errors = np.square(values(small, a.name) - before).mean(axis=1)
            noise = np.square(values(noisy, a.name) - before).mean(axis=1)
            assert noise.mean() == pytest.approx(errors.mean(), rel=0.1)
            assert np.corrcoef(noise, errors)[0, 1] > 0.3
    again = ramgguf.perturb(model, plan, tmp_path / "b.gguf", seed=1, threads=2)
    other = ramgguf.perturb(model, plan, tmp_path / "c.gguf", seed=2, threads=1)
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_the_noisy_model_is_one_that_llama_cpp_scores(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "p.json"
    ramgguf.plan(ramgguf.measure(model, formats=FORMATS, threads=1), "6bpw").save(plan)
    noisy = tmp_path / "n.gguf"
    said = _run("perturb", model, "--like", plan, "-o", noisy, "--seed", "3", "-t", "1")
    assert "n.gguf" in said
    found = ramgguf.evaluate([noisy], model, n_ctx=64, n_seq=2, threads=1).results[0]
    assert 0 < found.kld_mean < 5
    assert "exists" in _run("perturb", model, "--like", plan, "-o", noisy, status=1)
