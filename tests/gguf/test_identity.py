"""Models of equal header and size: what was made from one does not serve another."""

import json
from pathlib import Path

import numpy as np
import pytest

import ramgguf
from gguf_samples import finish_gguf
from ramgguf.core.errors import ImatrixError, PlanError
from ramgguf.core.values import TokenKind
from ramgguf.deploy.result import CheckResult
from ramgguf.evaluate.evaluation import identify
from ramgguf.evaluate.result import n_files
from ramgguf.gguf.identity import Source, difference, same_file
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.tokens import TokenRequest
from ramgguf.measure.result import Measurement
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.result import MemoryUse, Plan
from ramgguf.quants.hessian import load_hessians, new_hessians
from ramgguf.quants.imatrix import InputSquares, load_imatrix, write_imatrix
from ramgguf.refine.journal import RefineSettings
from ramgguf.refine.tokens import Refining, same
from ramgguf.sensitivity.result import ProbeTokens, Reading, Sensitivity, TensorSensitivity
from tiny_models import write_tiny_model

FORMATS = ["Q4_0", "Q8_0"]
OTHER_WEIGHTS = "the same header, but other weights"


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two fine-tunes of one base: all weights of the second are a little off the first's."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    one, other = (
        write_tiny_model(folder / "tiny.gguf", weight_type="F16", noise=noise)
        for folder, noise in zip(folders, (0.0, 0.01), strict=True)
    )
    with open_gguf(one) as a, open_gguf(other) as b:
        assert (a.header_sha256, a.n_bytes) == (b.header_sha256, b.n_bytes)
    return one, other


@pytest.fixture(scope="module")
def measured(twins: tuple[Path, Path]) -> tuple[Measurement, Measurement]:
    one, other = (ramgguf.measure(path, formats=FORMATS) for path in twins)
    return one, other


def _sensitivity(model: Path, measurement: Measurement) -> Sensitivity:
    """Return made-up sensitivities of a model."""
    kind: TokenKind = "random"
    with open_gguf(model) as file:
        source = Source.of(file)
    return Sensitivity(
        ramgguf_version="0",
        source=source,
        encoder="search",
        engine="none",
        tokens=ProbeTokens(kind=kind, n_sequences=1, n_tokens=1, seed=0, sha256=""),
        tensors=tuple(
            TensorSensitivity(
                name=t.name, role=t.role, layer=t.layer, n_weights=t.n_weights, alpha=1.0,
                relative_error=0.1, origin="measured",
                reading=Reading(name=t.name, format="Q4_0", nmse=0.01, kld=0.01,
                                standard_error=0.001),
            )
            for t in measurement.tensors
            if t.kept is None
        ),
    )  # fmt: skip


def test_the_sample_tells_twins_apart_and_a_copy_not(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(twins[0].read_bytes())
    with open_gguf(twins[0]) as a, open_gguf(twins[1]) as b, open_gguf(copy) as c:
        assert a.sample_sha256 == c.sample_sha256 != b.sample_sha256
        assert difference(a, c) is None
        assert difference(a, b) == difference(b, a) == OTHER_WEIGHTS
        assert "tiny.gguf" in Source.of(a).path


def test_a_change_of_any_one_tensor_is_seen(twins: tuple[Path, Path], tmp_path: Path) -> None:
    whole = twins[0].read_bytes()
    with open_gguf(twins[0]) as file:
        places = [(t.offset, t.n_bytes) for t in file.tensors]
        found = {file.sample_sha256}
    for offset, n_bytes in places:
        changed = tmp_path / "changed.gguf"
        data = bytearray(whole)
        part = np.frombuffer(data, np.uint8)[offset : offset + n_bytes]
        part ^= 1  # the last bit of each byte
        changed.write_bytes(data)
        with open_gguf(changed) as file:
            found.add(file.sample_sha256)
    assert len(found) == len(places) + 1


def test_the_sample_of_many_tensors_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    out = GGUFWriter(tmp_path / "many.gguf", "llama")
    for i in range(3000):
        out.add_tensor(f"blk.{i}.ffn_up.weight", np.full((4, 4096), i, np.float32))
    finish_gguf(out)
    n_read = 0
    with open_gguf(tmp_path / "many.gguf") as file:
        shard = file._shards[0]
        read = shard.read

        def counted(offset: int, buffer: memoryview) -> None:
            nonlocal n_read
            n_read += len(buffer)
            read(offset, buffer)

        monkeypatch.setattr(shard, "read", counted)
        assert len(file.sample_sha256) == 64
    assert n_read == 3000 * 4096


def test_a_sensitivity_of_a_twin_is_refused(
    twins: tuple[Path, Path], measured: tuple[Measurement, Measurement]
) -> None:
    found = _sensitivity(twins[0], measured[0])
    assert ramgguf.plan(measured[0], "6bpw", sensitivity=found, min_sqnr_db=0).notes is not None
    with pytest.raises(PlanError, match=f"the sensitivity is of .*{OTHER_WEIGHTS}"):
        ramgguf.plan(measured[1], "6bpw", sensitivity=found, min_sqnr_db=0)
    with pytest.raises(PlanError, match=f"the sensitivity is of .*{OTHER_WEIGHTS}"):
        ramgguf.reweigh(found, twins[1], None)


def test_a_plan_and_a_measurement_of_a_twin_are_refused(
    twins: tuple[Path, Path], measured: tuple[Measurement, Measurement], tmp_path: Path
) -> None:
    plan = ramgguf.plan(measured[0], "8bpw", min_sqnr_db=0)
    output = tmp_path / "out.gguf"
    with pytest.raises(PlanError, match=f"the plan is of .*{OTHER_WEIGHTS}"):
        ramgguf.quantize(twins[1], output=output, from_plan=plan)
    with pytest.raises(PlanError, match=f"the measurement is of .*{OTHER_WEIGHTS}"):
        ramgguf.quantize(twins[1], "8bpw", output, measurement=measured[0], min_sqnr_db=0)
    with pytest.raises(PlanError, match=f"the plan is of .*{OTHER_WEIGHTS}"):
        ramgguf.perturb(twins[1], plan, output)
    with pytest.raises(PlanError, match=f"the plan is of .*{OTHER_WEIGHTS}"):
        ramgguf.explain(plan, measured[1])
    assert not output.exists()
    assert ramgguf.quantize(twins[0], output=output, from_plan=plan).n_bytes == plan.n_bytes


def test_a_memory_limit_is_not_told_from_a_twin(
    twins: tuple[Path, Path], measured: tuple[Measurement, Measurement]
) -> None:
    from ramgguf.deploy.footprint_formula import ContextShape

    request = ramgguf.MemoryRequest(ContextShape(64), 10**9)
    limit = ramgguf.MemoryLimit(request, model=twins[1])
    with pytest.raises(PlanError, match=f"is not the model that was measured .*{OTHER_WEIGHTS}"):
        ramgguf.plan(measured[0], limit)


def _matrices(model: Path, folder: Path) -> tuple[Path, Path]:
    """Return an importance matrix and Hessians bound to the model, as calibrate writes them."""
    imatrix, hessian = folder / "i.gguf", folder / "h.gguf"
    with open_gguf(model) as file:
        tensors = [t for t in file.tensors if len(t.shape) == 2]
        write_imatrix(
            imatrix,
            {
                t.name: InputSquares(np.ones((1, t.row_length)), np.ones(1, np.int64))
                for t in tensors
            },
            dataset="", n_chunks=1, chunk_size=1, model_sample=file.sample_sha256, force=True,
        )  # fmt: skip
        sizes = {t.name: t.row_length for t in tensors}
        with new_hessians(
            hessian, {n: n for n in sizes}, sizes, 1, model_sample=file.sample_sha256, force=True
        ) as out:
            for name, n in sizes.items():
                out.write(f"{name}.gram", np.eye(n, dtype=np.float32))
            out.commit()
    return imatrix, hessian


def test_matrices_of_a_twin_are_refused(twins: tuple[Path, Path], tmp_path: Path) -> None:
    imatrix, hessian = _matrices(twins[0], tmp_path)
    with open_gguf(twins[0]) as file:
        assert load_imatrix(imatrix).model_sample == file.sample_sha256
        assert load_hessians(hessian).model_sample == file.sample_sha256
    assert ramgguf.measure(twins[0], formats=FORMATS, imatrix=imatrix).notes == ()
    with pytest.raises(ImatrixError, match=r"i\.gguf was made from another model than .*tiny"):
        ramgguf.measure(twins[1], formats=FORMATS, imatrix=imatrix)
    with pytest.raises(ImatrixError, match=r"i\.gguf was made from another model"):
        ramgguf.quantize(twins[1], "8bpw", tmp_path / "x.gguf", imatrix=imatrix)
    own, _ = _matrices(twins[1], tmp_path)
    with pytest.raises(ImatrixError, match=r"i\.gguf was made from another model"):
        ramgguf.measure(twins[0], formats=FORMATS, imatrix=own, hessian=hessian)
    _, others = _matrices(twins[0], tmp_path)
    own, _ = _matrices(twins[1], tmp_path / "..")
    with pytest.raises(ImatrixError, match=r"h\.gguf was made from another model"):
        ramgguf.measure(twins[1], formats=FORMATS, imatrix=own, hessian=others)


def test_a_refinement_s_journal_is_of_one_model(
    measured: tuple[Measurement, Measurement],
) -> None:
    one, other = (ramgguf.plan(m, "12bpw", min_sqnr_db=0, pins=[".=Q8_0"]) for m in measured)
    assert one.sha256() == other.sha256()  # the same formats
    settings = RefineSettings(
        plan_sha256=one.sha256(), sample_sha256=one.source.sample_sha256, budget=one.budget,
        tokens="self", seed=0, ids=(((1,),), ((1,),), ((1,),)), promise="",
    )  # fmt: skip
    wanted = Refining(1, TokenRequest(encoder="search"), sizes=(1, 1, 1))
    assert same(settings, one, wanted)
    assert not same(settings, other, wanted)
    assert same(settings.model_copy(update={"sample_sha256": None}), one, wanted)


def test_workers_and_results_tell_twins_apart(twins: tuple[Path, Path]) -> None:
    one, other = (identify(path) for path in twins)
    assert n_files([one, other, one]) == 2
    older = one.model_copy(update={"sample_sha256": None})
    assert n_files([one, older]) == n_files([older]) == 1
    from ramgguf.core.errors import EngineError
    from ramgguf.gguf.identity import FileIdentity

    with open_gguf(twins[0]) as file:
        identity = FileIdentity.of(file)
    same_file(identity).close()
    moved = FileIdentity(
        str(twins[1]), identity.n_bytes, identity.header_sha256, identity.sample_sha256
    )
    with pytest.raises(EngineError, match=OTHER_WEIGHTS):
        same_file(moved)


def test_a_check_is_of_one_file(twins: tuple[Path, Path]) -> None:
    with open_gguf(twins[0]) as a, open_gguf(twins[1]) as b:
        check = CheckResult(
            ramgguf_version="0", path=str(twins[0]), n_bytes=a.n_bytes,
            header_sha256=a.header_sha256, sample_sha256=a.sample_sha256, name=None, n_ctx=1,
            type_k="F16", type_v="F16", n_threads=1, limit=1, limit_source="", limit_method="",
            planned=MemoryUse(), planned_by="estimate",
        )  # fmt: skip
        assert check.differs(a) is None
        assert check.differs(b) == OTHER_WEIGHTS
        older = check.model_copy(update={"header_sha256": None, "sample_sha256": None})
        assert older.differs(b) is None


def _without_sample(value: Measurement | Plan | Sensitivity | Frontier) -> str:
    """Return the file as version 1 wrote it."""
    data = json.loads(value.to_json())
    del data["source"]["sample_sha256"]
    data["schema"] = data["schema"].replace("/2", "/1")
    for later in ("notes", "imatrix_used"):
        if later == "imatrix_used" or isinstance(value, Measurement):
            data.pop(later, None)
    return json.dumps(data)


def test_files_of_version_1_are_read_and_it_is_noted_that_their_model_is_less_sure(
    twins: tuple[Path, Path], measured: tuple[Measurement, Measurement], tmp_path: Path
) -> None:
    older = Measurement.from_json(_without_sample(measured[0]))
    assert older.source.sample_sha256 is None
    plan = ramgguf.plan(older, "8bpw", min_sqnr_db=0)
    assert any("the measurement has no hash of its model's data" in n for n in plan.notes)
    frontier = Frontier.from_json(_without_sample(ramgguf.curve(measured[0], min_sqnr_db=0)))
    assert frontier.source.sample_sha256 is None
    found = Sensitivity.from_json(_without_sample(_sensitivity(twins[0], measured[0])))
    plan = ramgguf.plan(measured[0], "8bpw", sensitivity=found, min_sqnr_db=0)
    assert any("the sensitivity has no hash of its model's data" in n for n in plan.notes)
    sure = ramgguf.plan(measured[0], "8bpw", min_sqnr_db=0)
    assert not any("no hash" in n for n in sure.notes)
    old_plan = Plan.from_json(_without_sample(sure))
    made = ramgguf.quantize(twins[0], output=tmp_path / "o.gguf", from_plan=old_plan)
    assert any("the plan has no hash of its model's data" in n for n in made.plan.notes)
    # The header and size are then all that is compared.
    ramgguf.quantize(twins[1], output=tmp_path / "p.gguf", from_plan=old_plan, verify=False)


def test_files_of_a_later_version_are_refused(measured: tuple[Measurement, Measurement]) -> None:
    text = measured[0].to_json().replace("measurement/2", "measurement/3")
    with pytest.raises(PlanError, match=r"schema is 'ramgguf\.measurement/3', expected .*/2"):
        Measurement.from_json(text)
