"""The exact oracle against mpmath, and against a formula everybody knows."""

import mpmath
import numpy as np
import pytest

from tests import exact

ROWS = {
    "confident": [20.0, 0.0],
    "very confident": [0.0, 60.0, -3.0],
    "typical": [1.5, -2.25, 0.125, 3.0],
    "masked": [-np.inf, 2.0, 1.0],
    "offset": [1e8, 1e8 + 1, 1e8 - 3],
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_nll_agrees_with_mpmath(row):
    for target, logit in enumerate(row):
        if logit == -np.inf:
            continue
        with mpmath.workdps(60):
            z = [mpmath.mpf(x) for x in row]
            loss = mpmath.log(mpmath.fsum(mpmath.exp(x - z[target]) for x in z))
            got = exact.nll(np.float64(row), target)
            high = float(got)
            error = (mpmath.mpf(high) + mpmath.mpf(float(got - np.longdouble(high)))) / loss - 1
        assert abs(error) < 1e-17
