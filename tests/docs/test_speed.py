"""What docs/speed.md says of larger models is what bench/passes.py calculates."""

import json
from pathlib import Path

import pytest

import passes
from alpha_passes import WAYS


def _rate(n_together: int, *, stand_in: str = "none", rate: float = 100.0) -> str:
    row = {"model": "smol768-f16.gguf", "part": "rates", "threads": 1, "all": [rate]}
    return json.dumps({**row, "stand_in": stand_in, "n_together": n_together})


def _alpha(way: str, seconds: float, planned_share: float) -> str:
    row = {"model": "smol768-f16.gguf", "part": "alpha", "threads": 1, "way": way}
    return json.dumps(
        {**row, "reload_seconds": 0.5, "seconds": seconds, "planned_share": planned_share}
    )


MEASURED = [
    *(_rate(8), _rate(64), _rate(64, stand_in="q8_0", rate=1.0)),
    *(_alpha(WAYS[0], 100.0, 1.0), _alpha(WAYS[1], 66.0, 0.6)),
]


def test_the_page_has_the_calculated_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text()
    assert passes.calculated(passes.RESULTS.read_text().splitlines()) in page


def test_the_models_have_the_weights_that_they_are_known_by() -> None:
    eight, mixture, seventy = passes.LARGE
    # Of 8.03 and 70.55 G, embeddings that are only looked up have 0.53 and 1.05.
    assert round(eight.n_read / 1e9, 2) == 7.50
    assert round(seventy.n_read / 1e9, 1) == 69.5
    assert round((mixture.n_read + 151936 * 2048) / 1e9, 1) == 30.5
    assert round((mixture.dense + mixture.experts + 151936 * 2048) / 1e9, 1) == 3.4


def test_times_follow_from_the_measured_rates() -> None:
    # 100 tokens/s of smol768, at any number of sequences: 3.763e10 operations/s on a core.
    table = passes.calculated(MEASURED)
    per_second = 8 * 2 * 188_153_856 * 100 / (2 * passes.LARGE[0].dense)
    row = next(line for line in table.splitlines() if "8 B" in line and "| 8 |" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert float(cells[3]) == pytest.approx(per_second, rel=0.03)
    assert float(cells[4].removesuffix(" min")) == pytest.approx(24_576 / per_second / 60, rel=0.03)
    alpha = 512 * (7 * 32 + 1) / per_second / 3600
    assert float(cells[5].removesuffix(" h")) == pytest.approx(alpha, rel=0.03)
    # A head of 7 % and infinitely many starts would leave 0.535; what was measured took 1.1 times
    # what was reckoned.
    share = float(cells[6].removesuffix(" h")) / alpha
    assert 1.1 * 0.535 < share < 1.1 * 0.68


def test_a_rate_that_was_not_measured_is_not_made_up() -> None:
    with pytest.raises(SystemExit, match="8 at a time"):
        passes.calculated([_rate(64)])
    with pytest.raises(SystemExit, match="α was not measured"):
        passes.calculated(MEASURED[:-1])
