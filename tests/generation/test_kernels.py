"""The Triton kernels without a card; with Triton in the environment every start would take seconds longer."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_kernels_compute_what_float64_does(interpreted) -> None:
    interpreted(__file__, "interpreted_kernels.py", 9)
