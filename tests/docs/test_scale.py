"""What docs/scale.md says of a large model is what bench/scale.py calculates."""

from pathlib import Path

import scale


def test_the_page_has_the_calculated_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for part in scale.text().split("\n\n"):
        assert part in page


def test_the_shape_has_the_weights_that_it_is_known_by() -> None:
    assert round(scale.N_WEIGHTS / 1e9) == 671
    assert round(scale.N_ACTIVE / 1e9) == 37
