"""From model to file on small models: sources of every kind, shards, damage, and verification."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

import llama_quantize
import ramgguf
from gguf_samples import finish_gguf, write_model
from imatrix_samples import write_gguf as write_imatrix
from ramgguf.core import files, parallel
from ramgguf.core.errors import BudgetError, FormatError, GGUFError, PlanError
from ramgguf.core.progress import Silent
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure import measure_file
from ramgguf.measure.result import Measurement
from ramgguf.plan import PlanOptions
from ramgguf.quantize import pipeline, preselection
from ramgguf.quantize.preselection import MOST_ROUNDS, measure_and_plan
from ramgguf.quants.encoders import EncoderName
from small_models import ARCHITECTURES, write_small_model

Float32 = NDArray[np.float32]


def write(path: Path, tensors: dict[str, tuple[Float32, Kind]], n_layers: int = 1) -> Path:
    """Write a llama-like model of these tensors, each in its type."""
    out = GGUFWriter(path, "llama")
    out.add_block_count(n_layers)
    for name, (weights, qtype) in tensors.items():
        if qtype in (Kind.F32, Kind.F16):
            out.add_tensor(name, weights.astype(np.float16 if qtype == Kind.F16 else np.float32))
        else:
            out.add_tensor(name, quantize(weights, qtype), raw_dtype=qtype)
    finish_gguf(out)
    return path


def random(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(path: Path) -> dict[str, Float32]:
    """Return all tensors as gguf decodes them."""
    return {
        t.name: np.array(t.data)
        if t.tensor_type == Kind.F32
        else dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
        for t in GGUFReader(path).tensors
    }


@pytest.mark.parametrize("source_type", [Kind.F32, Kind.F16, Kind.BF16])
def test_planned_errors_are_those_of_the_written_weights(source_type: Kind, tmp_path: Path) -> None:
    weights = random(64, 512)
    name = "blk.0.ffn_up.weight"
    source = write(tmp_path / "a.gguf", {name: (weights, source_type)})
    made = ramgguf.quantize(source, "5bpw", tmp_path / "b.gguf", effort="fast")
    (assignment,) = made.plan.assignments
    before = decoded(source)[name].astype(np.float64)
    error = before - decoded(made.paths[0])[name]
    nmse = float((error**2).sum() / (before**2).sum())
    assert assignment.nmse == pytest.approx(nmse, rel=1e-5)
    assert 0.001 < nmse < 0.01


def test_measured_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    from scipy import stats

    weights = np.random.default_rng(1).standard_t(5, (40, 512)).astype(np.float32)
    source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (weights, Kind.F32)})
    (tensor,) = ramgguf.measure(source).tensors
    assert tensor.sum_squares == pytest.approx(float((weights.astype(np.float64) ** 2).sum()))
    assert tensor.max_abs == np.abs(weights).max()
    assert tensor.excess_kurtosis == pytest.approx(stats.kurtosis(weights, axis=None), rel=1e-4)
    assert (tensor.shape, tensor.layer, tensor.role) == ((512, 40), 0, "ffn_up")


def test_experts_are_one_item_measured_over_all_slices(tmp_path: Path) -> None:
    weights = random(3, 64, 256)
    weights[2] *= 100  # one expert dominates
    name = "blk.0.ffn_down_exps.weight"
    source = write(tmp_path / "a.gguf", {name: (weights, Kind.F16)})
    (tensor,) = ramgguf.measure(source, formats=["Q4_0"], encoder="rtn").tensors
    point = next(p for p in tensor.points if p.format == "Q4_0")
    before = decoded(source)[name].astype(np.float64)
    after = dequantize(quantize(before.astype(np.float32), Kind.Q4_0), Kind.Q4_0)
    assert point.n_bytes == weights.size * 18 // 32
    assert point.nmse == pytest.approx(((before - after) ** 2).sum() / (before**2).sum(), rel=1e-5)


def test_rows_decide_which_formats_are_candidates_and_the_plan_says_so(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.gguf",
        {
            "blk.0.ffn_up.weight": (random(32, 576), Kind.F16),
            "blk.0.ffn_gate.weight": (random(32, 33), Kind.F16),
        },
    )
    measured = ramgguf.measure(source)
    up, gate = measured.tensors
    assert {p.format for p in up.points} == {
        "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "F16", "BF16",
    }  # fmt: skip
    assert [p.format for p in gate.points] == ["F16"]
    notes = "\n".join(ramgguf.plan(measured, "100%").notes)
    assert "rows of 576 are no multiple of 256" in notes
    assert "no smaller format suits its rows" in notes


@pytest.mark.parametrize(
    ("columns", "formats"),
    [(33, None), (48, None), (48, ["Q4_K", "Q6_K"]), (576, ["Q4_K", "Q6_K"])],
)
def test_rows_that_suit_no_block_take_16_bits_and_none_stays_in_f32(
    columns: int, formats: list[str] | None, tmp_path: Path
) -> None:
    name, other = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"
    weights = random(512, columns)
    source = write(
        tmp_path / "a.gguf", {name: (weights, Kind.F32), other: (random(64, 512), Kind.F32)}
    )
    made = ramgguf.quantize(
        source, "50%", tmp_path / "b.gguf", formats=formats, min_sqnr_db=0, effort="fast"
    )
    odd, whole = (a.format for a in made.plan.assignments)
    assert odd == "F16"  # of the two, the one that loses less
    assert np.array_equal(decoded(made.paths[0])[name], weights.astype(np.float16))
    assert made.worst_departure is not None
    assert whole in (formats or ()) if formats else whole not in ("F32", "BF16")


def test_llama_cpp_s_own_quantizer_takes_f16_for_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    llama = next(a for a in ARCHITECTURES if a.name == "llama")
    odd = {f"blk.1.odd_{n}.weight": (64, n) for n in (33, 48, 288)}
    source = write_small_model(
        tmp_path / "m.gguf", replace(llama, outside=llama.outside | odd),
        stored=lambda name, x: {name: (x, Kind.F32)} if "odd" in name else None,
    )  # fmt: skip
    theirs = llama_quantize.quantize(source, tmp_path / "theirs.gguf", "Q4_K_M", threads=1)
    ours = ramgguf.quantize(
        source, "30%", tmp_path / "ours.gguf", formats=["k"], min_sqnr_db=0, effort="fast"
    ).paths[0]
    types = [
        {t.name: t.tensor_type.name for t in GGUFReader(path).tensors if t.name in odd}
        for path in (theirs, ours)
    ]
    assert types[0] == dict(zip(odd, ("F16", "F16", "Q5_0"), strict=True))
    assert types[1] == dict.fromkeys(odd, "F16")  # only K-quants were asked for


def test_no_other_type_is_a_candidate_where_the_rows_suit_what_was_asked_for(
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (random(8, 48), Kind.F32)})
    (tensor,) = ramgguf.measure(source, formats=["F16", "Q4_K"]).tensors
    assert {p.format for p in tensor.points} == {"F16", "F32"}


def test_weights_beyond_f16_take_bf16(tmp_path: Path) -> None:
    weights = random(8, 48)
    weights[3, 7] = 3e6
    source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (weights, Kind.F32)})
    made = ramgguf.quantize(source, "90%", tmp_path / "b.gguf", effort="fast")
    assert [a.format for a in made.plan.assignments] == ["BF16"]


@pytest.mark.parametrize("formats", [None, ["Q4_K", "Q6_K"]])
@pytest.mark.parametrize("source_type", ["F32", "F16", "BF16"])
def test_pins_may_name_either_type_of_16_bits(
    source_type: str, formats: list[str] | None, tmp_path: Path
) -> None:
    names = [f"blk.0.ffn_{part}.weight" for part in ("up", "gate", "down")]
    source = write(tmp_path / "a.gguf", {n: (random(64, 512), Kind[source_type]) for n in names})
    made = ramgguf.quantize(
        source, "200%", tmp_path / "b.gguf", formats=formats, pins=["up=F16", "gate=BF16"],
        min_sqnr_db=0, effort="fast",
    )  # fmt: skip
    assert [a.format for a in made.plan.assignments] == ["F16", "BF16", source_type]
    before, after = decoded(source)[names[0]], decoded(made.paths[0])[names[0]]
    assert np.array_equal(after, before.astype(np.float16))


def test_no_plan_takes_the_other_type_of_16_bits_unless_it_gains(tmp_path: Path) -> None:
    for kind in ("F16", "BF16"):
        source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (random(8, 512), Kind[kind])})
        measured = ramgguf.measure(source)
        assert {"F16", "BF16"} <= {p.format for p in measured.tensors[0].points}
        assert [a.format for a in ramgguf.plan(measured, "200%").assignments] == [kind]


def test_a_scale_that_overflows_f16_makes_a_format_no_candidate(tmp_path: Path) -> None:
    weights = random(8, 256)
    weights[3, 7] = 3e6  # Q8_0 divides by 127, Q4_0 by 8: one overflows, one does not
    name = "blk.0.ffn_up.weight"
    source = write(tmp_path / "a.gguf", {name: (weights, Kind.F32)})
    (tensor,) = ramgguf.measure(source, formats=["Q4_0", "Q8_0"]).tensors
    assert {p.format for p in tensor.points} == {"Q8_0", "F32"}
    assert "overflow F16" in tensor.excluded["Q4_0"]
    with pytest.raises(PlanError, match="overflow F16"):
        ramgguf.plan(ramgguf.measure(source), "100%", pins=["ffn_up=Q4_0"])


def test_q8_0_is_a_source_only_when_asked(tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    source = write(tmp_path / "a.gguf", {name: (random(64, 512), Kind.Q8_0)})
    with pytest.raises(PlanError, match="--allow-requantize"):
        ramgguf.measure(source)
    made = ramgguf.quantize(
        source, "60%", tmp_path / "b.gguf", allow_requantize=True, effort="fast"
    )
    (assignment,) = made.plan.assignments
    assert assignment.source_format == "Q8_0"
    before, after = decoded(source)[name], decoded(made.paths[0])[name]
    nmse = float(((before - after) ** 2).sum() / (before**2).sum())
    assert assignment.nmse == pytest.approx(nmse, rel=1e-5)


def test_other_types_are_copied_and_it_is_said(tmp_path: Path) -> None:
    tensors = {
        "blk.0.ffn_up.weight": (random(64, 512), Kind.F16),
        "blk.0.ffn_gate.weight": (random(64, 512), Kind.Q5_0),
        "blk.0.ffn_norm.weight": (random(512), Kind.F32),
    }
    source = write(tmp_path / "a.gguf", tensors)
    made = ramgguf.quantize(source, "70%", tmp_path / "b.gguf", effort="fast")
    assert any("already quantized to Q5_0 (--allow-requantize" in n for n in made.plan.notes)
    with open_gguf(source) as a, open_gguf(made.paths[0]) as b:
        for name in ("blk.0.ffn_gate.weight", "blk.0.ffn_norm.weight"):
            before, after = a.tensor(name), b.tensor(name)
            rows = (a.read_rows(before, 0, before.n_rows), b.read_rows(after, 0, after.n_rows))
            assert np.array_equal(*rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_reported_by_name_and_index(
    value: float, tmp_path: Path
) -> None:
    weights = random(64, 512)
    weights[5, 3] = value
    source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (weights, Kind.F16)})
    with pytest.raises(FormatError, match=rf"blk\.0\.ffn_up\.weight\[{5 * 512 + 3}\]"):
        ramgguf.quantize(source, "5bpw", tmp_path / "b.gguf", effort="fast")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf"]


def test_threads_and_isa_levels_do_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ramgguf import _core
    from ramgguf.core import parallel

    monkeypatch.setattr(parallel, "CHUNK_WEIGHTS", 1 << 12)  # many chunks
    source = write_model(tmp_path / "a.gguf", rng=np.random.default_rng(2))
    first = ramgguf.quantize(source, "5bpw", tmp_path / "b.gguf", threads=1, effort="fast")
    active = _core.isa()
    try:
        for isa in _core.supported_isas():
            _core.set_isa(isa)
            for threads in (1, 3):
                again = ramgguf.quantize(
                    source, "5bpw", tmp_path / "c.gguf", threads=threads, force=True, effort="fast"
                )
                assert again.measurement is not None
                assert first.measurement is not None
                assert again.measurement.tensors == first.measurement.tensors
                assert again.paths[0].read_bytes() == first.paths[0].read_bytes()
    finally:
        _core.set_isa(active)


def test_shards_fit_the_budget_together_and_hold_the_same_tensors(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", rng=np.random.default_rng(3), n_layers=4)
    whole = ramgguf.quantize(source, "5bpw", tmp_path / "b.gguf", effort="fast")
    budget = whole.plan.budget
    split = ramgguf.quantize(
        source, budget, tmp_path / "c.gguf", split_max_bytes=budget // 3, effort="fast"
    )
    assert len(split.paths) >= 3
    assert sum(p.stat().st_size for p in split.paths) == split.n_bytes <= budget
    assert split.worst_departure == 0
    with open_gguf(split.paths[-1]) as file:
        assert {t.name: t.type_name for t in file.tensors} == {
            a.name: a.format for a in split.plan.assignments
        }


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one.gguf", rng=np.random.default_rng(4))
    other = write_model(tmp_path / "other.gguf", rng=np.random.default_rng(4), n_layers=3)
    plan = ramgguf.plan(ramgguf.measure(one), "5bpw")
    with pytest.raises(PlanError, match="another model"):
        ramgguf.quantize(other, from_plan=plan, output=tmp_path / "out.gguf")


def test_a_plan_of_another_version_has_the_bytes_that_this_one_writes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (random(32, 512), Kind.F16)})
    plan = ramgguf.plan(ramgguf.measure(source, threads=1), "50%", min_sqnr_db=0)
    for more, budget in ((32, plan.budget + 32), (-32, plan.budget)):
        older = plan.model_copy(
            update={
                "ramgguf_version": "0.0.1",
                "n_bytes": plan.n_bytes + more,
                "n_overhead_bytes": plan.n_overhead_bytes + more,
                "budget": budget,
            }
        )
        made = ramgguf.quantize(source, output=tmp_path / f"{more}.gguf", from_plan=older)
        assert made.plan.n_bytes == made.n_bytes == plan.n_bytes
    tight = older.model_copy(update={"budget": older.n_bytes})
    with pytest.raises(PlanError, match=r"of ramgguf 0\.0\.1.* 32 bytes more than its budget"):
        ramgguf.quantize(source, output=tmp_path / "b.gguf", from_plan=tight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_sqnr_db": math.nan}, "the least SQNR is nan dB"),
        ({"min_sqnr_db": -math.inf}, "the least SQNR is -inf dB"),
        ({"min_sqnr_db": 1e101}, "the least SQNR is 1e\\+101 dB"),
        ({"formats": []}, "no formats to choose from"),
        ({"pins": ["ffn_up=MXFP4"]}, "MXFP4 is measured on request only: .* --formats k"),
    ],
)
def test_options_that_no_plan_can_follow_are_errors_of_one_line(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (random(32, 512), Kind.F16)})
    with pytest.raises(PlanError, match=said):
        ramgguf.quantize(source, "50%", tmp_path / "b.gguf", effort="fast", **options)


@pytest.mark.parametrize("budget", [1e6, None, b"16GB", [1]])
def test_what_is_no_budget_is_said(tmp_path: Path, budget: Any) -> None:
    source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (random(32, 512), Kind.F16)})
    measured = ramgguf.measure(source, threads=1)
    with pytest.raises(BudgetError, match="is no number of bytes, no text"):
        ramgguf.plan(measured, budget)
    whole = ramgguf.plan(measured, np.int64(30_000), min_sqnr_db=0)  # type: ignore[arg-type]  # no int
    assert whole.budget == 30_000


def test_the_largest_budget_is_one(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (random(32, 512), Kind.F16)})
    plan = ramgguf.plan(ramgguf.measure(source, threads=1), "9000TB")
    assert plan.next_percent is None


def test_verification_notices_a_byte_that_is_not_as_planned(tmp_path: Path) -> None:
    from ramgguf.core.progress import Silent
    from ramgguf.quantize.verify import verify

    source = write_model(tmp_path / "a.gguf", rng=np.random.default_rng(5))
    made = ramgguf.quantize(source, "5bpw", tmp_path / "b.gguf", effort="fast")
    with open_gguf(made.paths[0]) as file:
        offsets = [t.offset + t.n_bytes // 2 for t in file.tensors]
    data = bytearray(made.paths[0].read_bytes())
    for offset in offsets:
        data[offset] ^= 0x40
        made.paths[0].write_bytes(data)
        data[offset] ^= 0x40
        with (
            open_gguf(source) as file,
            open_gguf(made.paths[0]) as written,
            pytest.raises(GGUFError, match=r"NMSE|bytes differ"),
        ):
            verify(file, made.plan, written, threads=1, progress=Silent())


def test_nothing_is_overwritten_without_force_and_before_any_work(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", rng=np.random.default_rng(6))
    older = tmp_path / "b.gguf"
    older.write_bytes(b"older")
    with pytest.raises(GGUFError, match="--force"):
        ramgguf.quantize(source, "5bpw", older, effort="fast")
    with pytest.raises(GGUFError, match="source"):
        ramgguf.quantize(source, "5bpw", source, force=True, effort="fast")
    assert older.read_bytes() == b"older"
    ramgguf.quantize(source, "5bpw", older, force=True, effort="fast")
    assert older.read_bytes()[:4] == b"GGUF"


def test_too_little_disk_is_said_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "a.gguf", rng=np.random.default_rng(7))
    monkeypatch.setattr(files, "free_bytes", lambda _: source.stat().st_size - 1)
    with pytest.raises(GGUFError, match="free"):
        ramgguf.quantize(source, "900TB", tmp_path / "b.gguf", effort="fast")
    # A budget beyond the disk's room is no error: the output is smaller.
    ramgguf.quantize(source, "40%", tmp_path / "c.gguf", min_sqnr_db=-99, effort="fast")
    (tmp_path / "c.gguf").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf"]


def test_a_plan_or_a_budget_but_not_both(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", rng=np.random.default_rng(8))
    plan = ramgguf.plan(ramgguf.measure(source), "5bpw")
    with pytest.raises(PlanError, match="a budget, memory or a plan is needed, and none was given"):
        ramgguf.quantize(source, None, tmp_path / "b.gguf")
    with pytest.raises(PlanError, match="either"):
        ramgguf.quantize(source, "5bpw", tmp_path / "b.gguf", from_plan=plan)
    with pytest.raises(BudgetError):
        ramgguf.quantize(source, -5, tmp_path / "b.gguf", effort="fast")


def test_a_measurement_survives_its_file_and_serves_again(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", rng=np.random.default_rng(9))
    measured = ramgguf.measure(source)
    measured.save(tmp_path / "m.json")
    assert Measurement.load(tmp_path / "m.json") == measured
    again = ramgguf.quantize(source, "5bpw", tmp_path / "b.gguf", measurement=measured)
    fresh = ramgguf.quantize(source, "5bpw", tmp_path / "c.gguf", effort="fast")
    assert again.paths[0].read_bytes() == fresh.paths[0].read_bytes()


def test_the_default_name_says_the_bits(tmp_path: Path) -> None:
    source = write_model(tmp_path / "tiny-F16.gguf", rng=np.random.default_rng(10))
    made = ramgguf.quantize(source, "6bpw", effort="fast")
    assert made.paths[0].name == f"tiny-ram-{made.plan.bpw:.2f}bpw.gguf"


def _large(path: Path) -> Path:
    """Write a model whose tensors are not taken whole by a sample."""
    rng = np.random.default_rng(11)
    names = [
        f"blk.{i}.{part}.weight" for i in range(3) for part in ("ffn_up", "ffn_down", "attn_v")
    ]
    tensors = {
        name: (
            rng.standard_t(4, (512, 512)).astype(np.float32) * float(rng.uniform(0.5, 2)),
            Kind.F16,
        )
        for name in names
    }
    return write(path, tensors, n_layers=3)


@pytest.mark.parametrize(
    ("encoder", "budget"),
    [*(("search", b) for b in ("2.7bpw", "4.4bpw", "5.6bpw", "8bpw")), ("rtn", "4.4bpw")],
)
def test_what_a_sample_leaves_out_is_in_no_better_plan(
    encoder: EncoderName, budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MANY_WEIGHTS", 0)
    source = _large(tmp_path / "a.gguf")
    everything = ramgguf.measure(source, encoder=encoder)
    best = ramgguf.plan(everything, budget, min_sqnr_db=0)
    made = ramgguf.quantize(
        source, budget, tmp_path / "b.gguf", encoder=encoder, min_sqnr_db=0, effort="fast"
    )
    assert made.measurement is not None
    assert made.plan.n_bytes <= best.budget
    # Of so few tensors, formats far from the others fill the last bytes of the best plan.
    assert best.total_cost * (1 - 1e-9) <= made.plan.total_cost <= best.total_cost * 1.05
    points = {t.name: {p.format: p for p in t.points} for t in everything.tensors}
    for tensor in made.measurement.tensors:
        assert 1 < len(tensor.points) < len(points[tensor.name])
        assert all(p == points[tensor.name][p.format] for p in tensor.points)
    assert any("sample" in note for note in made.plan.notes)


class _Counted:
    """Measures a model, and keeps which formats of which tensors it was asked for."""

    def __init__(self, source: Path) -> None:
        self.asked: list[dict[str, frozenset[str]] | None] = []
        self._source = source

    def __call__(self, **options: Any) -> Measurement:
        if not options.get("sampled"):
            self.asked.append(options.get("only"))
        with open_gguf(self._source) as file:
            return measure_file(
                file, n_overhead_bytes=0, encoder="search", threads=1, progress=Silent(), **options
            )


@pytest.mark.parametrize("budget", ["3.3bpw", "4.4bpw", "5.6bpw"])
def test_what_the_sample_misjudges_is_measured_in_turn_and_nothing_else(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A thousandth of each tensor: so small a sample misjudges.
    for name, value in (("SAMPLE_SHARE", 0.001), ("SAMPLE_WEIGHTS", 512), ("SAMPLE_CHUNKS", 1)):
        monkeypatch.setattr(parallel, name, value)
    measure = _Counted(_large(tmp_path / "a.gguf"))
    options = PlanOptions(min_sqnr_db=0)
    planned = partial(ramgguf.plan, budget=budget, **options)
    found, plan = measure_and_plan(
        measure, planned, options, lambda _: nullcontext(), preselects=True
    )
    first, *later = measure.asked
    assert first is not None
    assert all(len(names) <= 1 for names in first.values())
    assert 0 < len(later) < MOST_ROUNDS
    assert all(only and len(only) < len(first) for only in later)
    points = {t.name: {p.format: p for p in t.points} for t in found.tensors}
    assert all(points[a.name][a.format].nmse == a.nmse for a in plan.assignments)
    everything = measure()
    assert {t.name: t.sum_squares for t in found.tensors} == {
        t.name: t.sum_squares for t in everything.tensors
    }
    assert found.source == everything.source
    exact = {t.name: {p.format: p for p in t.points} for t in everything.tensors}
    assert all(p == exact[name][p.format] for name, own in points.items() for p in own.values())


def test_trials_of_swaps_get_formats_for_a_little_more_and_less(tmp_path: Path) -> None:
    options = PlanOptions(min_sqnr_db=0)
    planned = partial(ramgguf.plan, budget="4.4bpw", **options)
    source = _large(tmp_path / "a.gguf")
    (few, _), (more, _) = (
        measure_and_plan(
            _Counted(source), planned, options, lambda _: nullcontext(),
            preselects=True, alternatives=alternatives,
        )
        for alternatives in (False, True)
    )  # fmt: skip
    n_few, n_more = (sum(len(t.points) for t in m.tensors) for m in (few, more))
    assert n_few < 0.75 * n_more


def test_everything_is_measured_when_what_the_sample_chose_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MANY_WEIGHTS", 0)
    source = _large(tmp_path / "a.gguf")
    names = [t.name for t in ramgguf.measure(source, formats=["Q8_0"]).tensors]
    chosen = dict.fromkeys(names, frozenset({"Q8_0"}))
    monkeypatch.setattr(preselection, "_chosen", lambda _: chosen)
    made = ramgguf.quantize(
        source, "5bpw", tmp_path / "b.gguf", encoder="search", min_sqnr_db=0, effort="fast"
    )
    assert made.plan.n_bytes <= made.plan.budget
    assert "F16" not in {a.format for a in made.plan.assignments}
    with pytest.raises(BudgetError, match="below the smallest plan"):
        ramgguf.quantize(source, "1bpw", tmp_path / "c.gguf", encoder="search", effort="fast")


def test_a_pin_to_a_slow_format_is_sampled_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MANY_WEIGHTS", 0)
    source = _large(tmp_path / "a.gguf")
    with open_gguf(source) as file:
        names = [t.name for t in file.tensors if t.name.endswith("ffn_up.weight")]
        entries = {
            f"{t.name}.{kind}": np.ones((1, t.row_length if kind == "in_sum2" else 1), np.float32)
            for t in file.tensors
            for kind in ("in_sum2", "counts")
        }
    imatrix = write_imatrix(tmp_path / "i.gguf", entries)
    made = ramgguf.quantize(
        source, "8bpw", tmp_path / "b.gguf", encoder="search", imatrix=imatrix, min_sqnr_db=0,
        effort="fast", pins=[r"ffn_up\.weight$=IQ1_M"],
    )  # fmt: skip
    formats_of = {a.name: a.format for a in made.plan.assignments}
    assert names
    assert {formats_of[name] for name in names} == {"IQ1_M"}
    assert any("sample" in note for note in made.plan.notes)
