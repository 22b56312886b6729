"""The libraries take the kernels that `make test-dispatch` asks for; else its runs would all be the same."""

from __future__ import annotations

import pytest
from dispatches import DISPATCHES, NUMERIC, TESTS, said


def test_the_files_are_there() -> None:
    assert [name for name in NUMERIC if not (TESTS / name).is_file()] == []


@pytest.mark.multiprocess
def test_each_dispatch_is_another() -> None:
    here = said({})[0]
    if here != "AVX512":
        pytest.skip(f"torch finds {here} here, and cannot imitate what is younger")
    found = {name: said(environment) for name, (_, environment) in DISPATCHES.items()}
    assert [found[name][0] for name in found] == ["DEFAULT", "AVX2", "AVX512"]
    assert [found[name][1] for name in found] == [1, 2, 1]
    openblas = [blas for _, _, libraries in found.values() for blas in libraries if blas.startswith("openblas")]
    assert len(set(openblas)) == len(DISPATCHES)
