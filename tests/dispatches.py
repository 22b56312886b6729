"""Run the tests that compare computed numbers as on other processors, as far as one machine can imitate them.

    python tests/dispatches.py [--only NAME] [-n auto --dist loadfile ...]     # further arguments are pytest's

Libraries choose their kernels by the processor, and each can be told to take those of an older one. One run sets all of them
(torch's own, MKL, oneDNN, OpenBLAS) to the same age, and there is a run with two threads. The tests are those whose results come
out of these kernels: scores, decompositions, quantized products, adapters, optimizers, merges. The others compare names, bytes
and messages, which no kernel computes; running them again would say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from spectrum_peft.machine import machine

TESTS = Path(__file__).resolve().parent
NUMERIC = (
    "scan/test_criteria.py", "scan/test_gram.py", "scan/test_svd.py", "weights/test_quantized.py", "probe/test_probe.py",
    "tuner/test_lorsa.py", "tuner/test_ranks.py", "tuner/test_shared.py", "train/test_optim.py", "export/test_export.py",
)  # fmt: skip
ONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Threads that wait asleep: workers side by side would starve each other otherwise.
TWO = dict.fromkeys(ONE, "2") | {"OMP_WAIT_POLICY": "PASSIVE"}
# Of each run: the least that torch must find in the processor, and the environment. oneDNN is kept above AVX512_CORE without
# VNNI, on which 8-bit products are wrong and refused (tests/weights/test_quantized.py imitates that one).
DISPATCHES: dict[str, tuple[str, dict[str, str]]] = {
    "baseline": ("DEFAULT", ONE | {
        "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Prescott",
    }),
    "avx2-two-threads": ("AVX2", TWO | {
        "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    }),
    "avx512": ("AVX512", ONE | {
        "ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "OPENBLAS_CORETYPE": "SkylakeX",
    }),
}  # fmt: skip
_AGES = ("DEFAULT", "NO AVX", "AVX2", "AVX512")
# What the libraries say they took, so that a variable that they no longer read is seen.
_SAID = """
import json, torch, scipy.linalg
from threadpoolctl import threadpool_info
blas = [f"{lib['internal_api']} {lib.get('architecture') or ''}" for lib in threadpool_info() if lib["user_api"] == "blas"]
print(json.dumps([torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), sorted(set(blas))]))
"""


def said(environment: dict[str, str]) -> tuple[str, int, list[str]]:
    """torch's kernels, its threads, and the BLAS libraries with theirs."""
    done = subprocess.run(
        [sys.executable, "-c", _SAID], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    capability, threads, blas = json.loads(done.stdout.splitlines()[-1])
    return capability, threads, blas


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=DISPATCHES, help="one of them")
    parser.add_argument("-o", "--output", type=Path, help="file for the figures, JSON")
    options, pytest_arguments = parser.parse_known_args()
    here = said({})[0]
    results = {}
    for name, (least, environment) in DISPATCHES.items():
        if options.only not in (None, name):
            continue
        if _AGES.index(here) < _AGES.index(least) or here not in _AGES:
            print(f"{name}: left out, torch finds {here} here", flush=True)
            continue
        capability, threads, blas = said(environment)
        print(f"--- {name}: torch {capability}, {threads} threads, {', '.join(blas)}", flush=True)
        began = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", *pytest_arguments, *(str(TESTS / test) for test in NUMERIC)]
        done = subprocess.run(
            command, env=os.environ | environment, cwd=TESTS.parent, stdout=subprocess.PIPE, text=True
        )
        print(done.stdout if done.returncode else done.stdout[-200:], flush=True)
        counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout[-200:])}
        results[name] = {
            "environment": environment, "torch": capability, "blas": blas, "exit_code": done.returncode, **counts,
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
    if options.output:
        written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {"record": "dispatches", "written": written, "machine": machine(), "kernels": here, "runs": results}
        options.output.write_text(json.dumps(facts, indent=1) + "\n")
    for name, run in results.items():
        print(f"{name}: {run.get('passed', 0)} passed, {run.get('failed', 0)} failed, {run['seconds']:.0f} s")
    return int(any(run["exit_code"] for run in results.values()) or not results)


if __name__ == "__main__":
    raise SystemExit(main())
