"""From readings to an α for every tensor: noise is drawn in, outliers are kept, zeros are not."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramgguf.core.errors import EngineError
from ramgguf.sensitivity.impute import CARRIED_ERROR, Member, impute
from ramgguf.sensitivity.result import LayerReading, Reading, TensorSensitivity

N = 1000


def _members(n_layers: int, role: str = "ffn_up") -> list[Member]:
    return [Member(f"blk.{i}.{role}.weight", role, i, N) for i in range(n_layers)]


def _reading(member: Member, alpha: float, error: float = 0.0) -> Reading:
    """Return a reading of α nats per NMSE, with a relative standard error."""
    kld = alpha * 0.01
    return Reading(name=member.name, format="Q4_0", nmse=0.01, kld=kld, standard_error=error * kld)


def _filled(members: list[Member], readings: list[Reading]) -> dict[str, TensorSensitivity]:
    return {t.name: t for t in impute(members, {r.name: r for r in readings})}


def test_exact_readings_are_kept() -> None:
    members = _members(6)
    alphas = [1.0, 2.0, 5.0, 0.5, 80.0, 1.5]
    found = _filled(members, [_reading(m, a) for m, a in zip(members, alphas, strict=True)])
    assert [found[m.name].alpha for m in members] == pytest.approx(alphas)
    assert {t.origin for t in found.values()} == {"measured"}


def test_noisy_readings_come_nearer_to_the_truth() -> None:
    rng = np.random.default_rng(0)
    members = _members(200)
    truth = np.exp(rng.normal(0, 0.2, len(members)))
    noisy = truth * np.exp(rng.normal(0, 0.5, len(members)))
    found = _filled(members, [_reading(m, a, 0.5) for m, a in zip(members, noisy, strict=True)])
    shrunk = np.array([found[m.name].alpha for m in members])
    before = float(np.sqrt(np.mean(np.log(noisy / truth) ** 2)))
    after = float(np.sqrt(np.mean(np.log(shrunk / truth) ** 2)))
    assert 0.3 * before < after < 0.75 * before


def test_a_reading_far_out_and_sure_is_kept() -> None:
    members = _members(20)
    alphas = [1.0 + 0.01 * i for i in range(19)] + [30.0]
    found = _filled(members, [_reading(m, a, 0.1) for m, a in zip(members, alphas, strict=True)])
    assert found[members[-1].name].alpha == pytest.approx(30, rel=0.05)


def test_alpha_is_carried_by_the_error_of_a_layer_times_the_kld_per_error_around_it() -> None:
    members = _members(9) + _members(9, "attn_q")
    alphas = [3.0, 0.2, 7.0, 0.5, 40.0, 1.0, 0.3, 2.0, 5.0]
    # The KLD per error halves from layer to layer; formats' NMSE plays no part.
    layers = {
        m.name: LayerReading(
            name=m.name, format="Q4_0", nmse=0.01 * (1 + k), layer=k + 2,
            error=alpha * 0.01 * (1 + k) * 2.0**k,
        )
        for k, (m, alpha) in enumerate(zip(members, alphas, strict=False))
    }  # fmt: skip
    read = [_reading(members[k], alphas[k]) for k in (0, 4, 8)]
    others = [_reading(members[9 + k], 1.0) for k in (0, 8)]
    found = impute(members, {r.name: r for r in read + others}, layers)
    by_name = {t.name: t for t in found}
    ours = [by_name[m.name] for m in members[:9]]
    assert [t.origin for t in ours] == ["measured" if k % 4 == 0 else "carried" for k in range(9)]
    assert [t.alpha for t in ours] == pytest.approx(alphas)
    assert all(t.relative_error == CARRIED_ERROR for t in ours if t.origin == "carried")
    assert {by_name[m.name].origin for m in members[10:17]} == {"interpolated"}


@pytest.mark.parametrize("error", [0.0, None])
def test_where_a_layer_reading_tells_nothing_the_role_is_interpolated(error: float | None) -> None:
    members = _members(5)
    layers = {
        m.name: LayerReading(name=m.name, format="Q4_0", nmse=0.01, layer=3, error=e)
        for m in members
        if (e := 0.5 if m.layer != 2 else error) is not None
    }
    read = [_reading(members[0], 1.0), _reading(members[4], 16.0)]
    found = {t.name: t for t in impute(members, {r.name: r for r in read}, layers)}
    assert found[members[2].name].origin == "interpolated"
    assert found[members[2].name].alpha == pytest.approx(4.0)
    assert found[members[1].name].origin == "carried"


def test_layers_between_are_interpolated_in_the_logarithm() -> None:
    members = _members(9)
    found = _filled(members, [_reading(members[0], 1.0), _reading(members[8], 16.0)])
    assert found["blk.4.ffn_up.weight"].alpha == pytest.approx(4)
    assert found["blk.2.ffn_up.weight"].alpha == pytest.approx(2)
    assert found["blk.2.ffn_up.weight"].origin == "interpolated"


def test_idle_tensors_get_their_role_s_median_and_not_zero() -> None:
    members = _members(5)
    readings = [_reading(m, a) for m, a in zip(members, [1.0, 3.0, 9.0, 3.0, 0.0], strict=True)]
    last = _filled(members, readings)["blk.4.ffn_up.weight"]
    assert last.alpha == pytest.approx(3)
    assert last.origin == "idle"


def test_roles_without_readings_get_the_median_per_weight() -> None:
    members = [*_members(3), Member("output.weight", "head", None, 10 * N)]
    found = _filled(members, [_reading(m, 2.0) for m in members[:3]])
    assert found["output.weight"].alpha == pytest.approx(20)
    assert found["output.weight"].origin == "role"


def test_a_model_that_nothing_changes_is_an_error() -> None:
    members = _members(3)
    with pytest.raises(EngineError, match="did not read the copy"):
        _filled(members, [_reading(m, 0.0) for m in members])


def test_a_model_on_the_grid_of_its_probes_is_said_to_be_one() -> None:
    members = _members(3)
    readings = [_reading(m, 0.0).model_copy(update={"nmse": 0.0}) for m in members]
    with pytest.raises(EngineError, match="lie on the grid of Q4_0, in which they were probed"):
        _filled(members, readings)


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1e6), st.floats(0, 5)),
        min_size=1,
        max_size=12,
    )
)
def test_alphas_stay_between_the_smallest_and_the_largest_reading(
    readings: list[tuple[float, float]],
) -> None:
    members = _members(len(readings) + 2)
    made = [_reading(m, a, e) for m, (a, e) in zip(members[1:], readings, strict=False)]
    found = impute(members, {r.name: r for r in made})
    low, high = min(a for a, _ in readings), max(a for a, _ in readings)
    assert [t.name for t in found] == [m.name for m in members]
    for t in found:
        assert low * (1 - 1e-6) <= t.alpha <= high * (1 + 1e-6)
        assert math.isfinite(t.relative_error)
