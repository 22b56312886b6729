"""Singular values from the Gram matrix, by both libraries, whichever of them this processor would take."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectrum_peft import machine
from spectrum_peft.scan import gram
from spectrum_peft.scan.gram import gram_values

WAYS = {"torch": False, "openblas": True}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(gram, "prefers_openblas", lambda matrix: WAYS[request.param])
    return str(request.param)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "wide": lambda m: m,
    "tall": lambda m: m.T.contiguous(),
    "turned": lambda m: m.T,
    "square": lambda m: m[:, : len(m)].contiguous(),
    "square, turned": lambda m: m[:, : len(m)].contiguous().T,
    "strided": lambda m: m[::2, ::3],
    "one row": lambda m: m[:1],
    "one column": lambda m: m[:, :1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_values_are_those_of_the_svd(
    way: str, layout: str, dtype: torch.dtype, scale: float, seeded: torch.Generator
) -> None:
    """In float64, so that layouts are told apart and not roundings; more than a slice long where it is converted."""
    whole = torch.randn(90, gram._SLICE + 30, generator=seeded, dtype=torch.float64).to(dtype)
    matrix = LAYOUTS[layout](whole)
    before = matrix.clone()
    exact = torch.linalg.svdvals(matrix.double()) / scale
    found = gram_values(matrix, torch.float64, scale)
    assert found.dtype == torch.float64
    # Off by 90 * 2.2e-16 of the largest eigenvalue at most; its root, for values within 10 of the largest, by 1e-13 of that.
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10 * float(exact[0]))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("side", [1, 2, 31, 33, 128, 200])
def test_float32_is_computed_in_float32(way: str, side: int, seeded: torch.Generator) -> None:
    """Squares are right to a few hundred eps32 of the largest, and not to eps64."""
    matrix = torch.randn(side, side + 5, generator=seeded)
    exact, found = torch.linalg.svdvals(matrix.double()).square(), gram_values(matrix, torch.float32, 1.0).square()
    error = float((found - exact).abs().max() / exact[0])
    assert error < 300 * torch.finfo(torch.float32).eps
    assert side < 31 or error > 1e-10


def test_both_libraries_agree(monkeypatch: pytest.MonkeyPatch, seeded: torch.Generator) -> None:
    matrix = torch.randn(300, 700, generator=seeded, dtype=torch.float64)
    found = []
    for choice in WAYS.values():
        monkeypatch.setattr(gram, "prefers_openblas", lambda matrix, choice=choice: choice)
        found.append(gram_values(matrix, torch.float64, 1.0))
    # Float64: some hundred units of 1.1e-16 of the largest eigenvalue, and the least is a twentieth of that.
    torch.testing.assert_close(*found, rtol=1e-12, atol=0.0)
    assert not torch.equal(*found)  # they are two libraries


def test_a_large_gram_matrix_is_reduced_by_torch(monkeypatch: pytest.MonkeyPatch, seeded: torch.Generator) -> None:
    monkeypatch.setattr(gram, "prefers_openblas", lambda matrix: True)
    monkeypatch.setattr(gram, "_OPENBLAS_REDUCES_TO", 100)
    monkeypatch.delattr(gram, "_openblas_eigenvalues")
    matrix = torch.randn(101, 150, generator=seeded, dtype=torch.float64)
    # Squares cost half the digits where values are small; here the least is a tenth of the largest: 1e-16 * 100 * the
    # matrix' 101 sums.
    torch.testing.assert_close(
        gram_values(matrix, torch.float64, 1.0), torch.linalg.svdvals(matrix), rtol=1e-10, atol=0.0
    )


def test_matrices_side_by_side_have_the_values_that_they_have_alone(way: str, seeded: torch.Generator) -> None:
    matrices = [torch.randn(160, 200 + i, generator=seeded) for i in range(12)]
    with gram.one_openblas_thread():
        alone = [gram_values(m, torch.float32, 1.0) for m in matrices]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda m: gram_values(m, torch.float32, 1.0), matrices * 3))
    assert all(torch.equal(a, b) for a, b in zip(alone * 3, together, strict=True))


@pytest.mark.parametrize(
    ("maker", "mkl", "shape", "wanted"),
    [
        ("AuthenticAMD", True, (128, 4096), True),
        ("AuthenticAMD", True, (127, 4096), False),  # not worth SciPy's import
        ("GenuineIntel", True, (1024, 1024), False),  # torch's library is Intel's own there
        ("", True, (1024, 1024), False),
        ("AuthenticAMD", False, (1024, 1024), False),  # torch was built with another library
    ],
)
def test_openblas_is_taken_on_amd_only(
    maker: str, mkl: bool, shape: tuple[int, int], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "cpu_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert gram.prefers_openblas(torch.empty(shape)) is wanted
    assert not gram.prefers_openblas(torch.empty(shape, device="meta"))
    monkeypatch.setattr(gram, "_routines", dict)  # a SciPy whose LAPACK has other integers
    assert not gram.prefers_openblas(torch.empty(shape))


def test_openblas_has_one_thread_during_a_scan_and_its_own_number_after(monkeypatch: pytest.MonkeyPatch) -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads() -> set[int]:
        return {lib["num_threads"] for lib in threadpool_info() if lib["internal_api"] == "openblas"}

    monkeypatch.setattr(gram, "cpu_maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    gram._routines()
    with threadpool_limits(2, user_api="blas"):
        if threads() != {2}:
            pytest.skip("OpenBLAS was built for one thread")
        with gram.one_openblas_thread():
            assert threads() == {1}
        assert threads() == {2}


def test_the_processors_maker_is_asked_elsewhere_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = machine.cpu_maker.__wrapped__
    if Path("/proc/cpuinfo").exists() and platform.machine() == "x86_64":
        assert ask() in {"GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls", "  Shanghai  "}
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    assert ask() == "AuthenticAMD"
    monkeypatch.delenv("PROCESSOR_IDENTIFIER")
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel")
    assert ask() == "GenuineIntel"
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert ask() == ""
