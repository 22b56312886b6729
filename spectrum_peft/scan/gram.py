"""The smaller Gram matrix of a matrix and the roots of its eigenvalues: torch's way, and SciPy's OpenBLAS where that is faster.

Which library computes depends on the processor's maker and the size alone, so that a machine gives the same bytes every time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..devices import exact
from ..errors import CheckpointError
from ..machine import cpu_maker

# A product fills an eighth of the Gram matrix's rows, up to the diagonal only: 9/16 of the work of the whole. Less than
# 64 rows at a time cost more than they save.
_BLOCKS, _LEAST = 8, 64
# Elements of the long side that are converted at a time, so that a bfloat16 matrix is never held twice.
_SLICE = 2048
# Sides from which OpenBLAS is worth its import, and up to which its reduction to a tridiagonal matrix is the faster one.
_OPENBLAS_FROM, _OPENBLAS_REDUCES_TO = 128, 2560
# Columns that the reduction takes at a time; LAPACK's own choice (ilaenv) for all sizes here.
_PANEL = 32


def gram_values(matrix: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """(k,) float64 on the CPU, descending: roots of the eigenvalues of the smaller Gram matrix of `matrix / scale`.

    Args:
        matrix: (n, m), any floating dtype and device. dtype: computed in, float32 or float64.
    """
    openblas = prefers_openblas(matrix)
    gram = _openblas_gram(matrix, dtype, scale) if openblas else _torch_gram(matrix, dtype, scale)
    if openblas and len(gram) <= _OPENBLAS_REDUCES_TO:
        eigenvalues = _openblas_eigenvalues(gram)
    else:
        # Not the upper triangle: from there the reduction was seen to err by ten times as much.
        eigenvalues = torch.linalg.eigvalsh(exact(gram), UPLO="L")
    return eigenvalues.cpu().to(torch.float64).clamp_(min=0.0).sqrt_().flip(0)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 in float32 on a GPU, whatever the program asked for elsewhere: TF32 keeps ten bits of a factor."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def prefers_openblas(matrix: Tensor) -> bool:
    """Whether SciPy's OpenBLAS does this one faster than torch."""
    return matrix.device.type == "cpu" and min(matrix.shape) >= _OPENBLAS_FROM and _openblas_is_faster()


def _openblas_is_faster() -> bool:
    """On AMD's processors, where torch's library is Intel's."""
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return mkl and cpu_maker() == "AuthenticAMD" and bool(_routines())


@contextmanager
def one_openblas_thread() -> Iterator[None]:
    """OpenBLAS' number of threads is the whole process's; it is put back. Nothing where OpenBLAS is not taken here."""
    if not _openblas_is_faster():
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):  # of what is loaded by now, as OpenBLAS is
        yield


def _slices(matrix: Tensor, dtype: torch.dtype, scale: float, step: int) -> Iterator[Tensor]:
    """Parts of `step` of the long side, converted and scaled."""
    wide = matrix.shape[0] <= matrix.shape[1]
    for start in range(0, max(matrix.shape), step):
        part = (matrix[:, start : start + step] if wide else matrix[start : start + step]).to(dtype)
        yield part if scale == 1.0 else part / scale


def _torch_gram(matrix: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """(k, k) `dtype`: W W^T for a wide matrix, W^T W for a tall one; only the lower triangle is meaningful."""
    wide = matrix.shape[0] <= matrix.shape[1]
    k = min(matrix.shape)
    gram = torch.empty(k, k, dtype=dtype, device=matrix.device)
    rows = max(_LEAST, -(-k // _BLOCKS))
    beta = 0.0
    for part in _slices(matrix, dtype, scale, _SLICE):
        left, right = (part, part.T) if wide else (part.T, part)
        for top in range(0, k, rows):
            bottom = min(top + rows, k)
            gram[top:bottom, :bottom].addmm_(left[top:bottom], right[:, :bottom], beta=beta)
        beta = 1.0
    return gram


# --- OpenBLAS --------------------------------------------------------------------------------------------------------


@cache
def _routines() -> dict[str, Callable[..., None]]:
    """{name: routine} of the BLAS and LAPACK that SciPy brings.

    SciPy's Python functions hold the interpreter's lock while they run, so that matrices would wait for each other. The C
    functions behind its Cython interface, which is documented for such use, do not when they are called from here.

    Returns:
        Nothing where their arguments are not those of LAPACK with 32-bit integers (a build with 64-bit ones).
    """
    from scipy.linalg import cython_blas, cython_lapack

    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    found: dict[str, Callable[..., None]] = {}
    for module, name, arguments in (
        (cython_blas, "syrk", 10),
        (cython_lapack, "sytrd", 10),
        (cython_lapack, "sterf", 4),
    ):
        for letter in "sd":
            capsule = module.__pyx_capi__[letter + name]
            signature = name_of(capsule)
            if b" int *" not in signature or signature.count(b"*") != arguments:
                return {}
            address = pointer_of(capsule, signature)
            found[letter + name] = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address)
    return found


def _routine(name: str, dtype: torch.dtype) -> Callable[..., None]:
    return _routines()[("s" if dtype == torch.float32 else "d") + name]


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


def _openblas_gram(matrix: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """As `_torch_gram`; the strides are LAPACK's, along columns."""
    if not matrix.is_contiguous() and matrix.T.is_contiguous():
        matrix = matrix.T  # of the same values
    wide = matrix.shape[0] <= matrix.shape[1]
    k = min(matrix.shape)
    gram = torch.empty(k, k, dtype=dtype)
    number = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    syrk, beta = _routine("syrk", dtype), 0.0
    converted = matrix.dtype != dtype or scale != 1.0
    for part in _slices(matrix, dtype, scale, _SLICE if converted else max(matrix.shape)):
        part = part.contiguous()
        # To LAPACK, which counts along columns, the rows of torch's matrix are columns: a wide one is multiplied turned.
        syrk(
            ctypes.c_char_p(b"L"), ctypes.c_char_p(b"T" if wide else b"N"), _int(k), _int(part.shape[1 if wide else 0]),
            ctypes.byref(number(1.0)), part.data_ptr(), _int(part.shape[1]),
            ctypes.byref(number(beta)), gram.data_ptr(), _int(k),
        )  # fmt: skip
        beta = 1.0
    return gram.T


def _openblas_eigenvalues(gram: Tensor) -> Tensor:
    """(k,) ascending, of what `_openblas_gram` gives; it is overwritten.

    What LAPACK's `syevd` does when no vectors are asked for, without its copies and checks.
    """
    k = len(gram)
    diagonal, beside, tau = (torch.empty(k, dtype=gram.dtype) for _ in range(3))
    work = torch.empty(_PANEL * k, dtype=gram.dtype)
    info = ctypes.c_int()
    _routine("sytrd", gram.dtype)(
        ctypes.c_char_p(b"L"), _int(k), gram.data_ptr(), _int(k), diagonal.data_ptr(), beside.data_ptr(),
        tau.data_ptr(), work.data_ptr(), _int(len(work)), ctypes.byref(info),
    )  # fmt: skip
    _routine("sterf", gram.dtype)(_int(k), diagonal.data_ptr(), beside.data_ptr(), ctypes.byref(info))
    if info.value:
        raise CheckpointError(f"a matrix of side {k}: {info.value} of its eigenvalues were not found, wanted all.")
    return diagonal
