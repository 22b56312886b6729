"""Selective fine-tuning by weight spectrum: scan a checkpoint, plan what trains, train it, export it.

Public names are imported on first use (PEP 562): `import spectrum_peft` loads neither torch, transformers nor peft. It
does make the method known to PEFT, whenever peft is imported, before or after this package and by whomever.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

# Public name -> module that defines it.
_MODULE_OF = {
    "GradientReport": "records",
    "Plan": "records",
    "SnrReport": "records",
    "SpectrumCallback": "callback",
    "SpectrumConfig": "config",
    "SpectrumError": "errors",
    "SpectrumModel": "tuner",
    "SpectrumScanner": "scanner",
    "calibration_batches": "probe",
    "estimate_memory": "memory",
    "export_lora": "export",
    "fit_to_memory": "memory",
    "load_model_with_spectrum": "loading",
    "make_plan": "plan",
    "merge_into_base": "export",
    "parameter_groups": "optim",
    "probe_gradients": "probe",
    "quantization_config_for": "loading",
    "scan_weights": "scan",
}
# Modules whose names are of no use while PEFT does not know the method.
_ON_PEFT = frozenset({"callback", "config", "loading", "memory", "tuner"})

__all__ = sorted(_MODULE_OF)

# What went wrong when the method was registered; raised by the first use of a name that needs it.
_problem: Exception | None = None


def _register() -> None:
    """Import the tuner, which registers itself with PEFT. Never raises: it runs inside somebody's `import peft`."""
    global _problem
    try:
        importlib.import_module(f"{__name__}.tuner")
    except Exception as error:
        _problem = error
    else:
        _problem = None


@wrapt.when_imported("peft")
def _peft_is_there(_: ModuleType) -> None:
    config = sys.modules.get(f"{__name__}.config")
    # Half-made: it is our own config that imports peft. The tuner needs it whole, so the second hook goes on from here.
    if config is None or hasattr(config, "SpectrumConfig"):
        _register()


@wrapt.when_imported(f"{__name__}.config")
def _config_is_there(_: ModuleType) -> None:
    _register()


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    if module in _ON_PEFT and _problem is not None:
        from .errors import SpectrumError

        raise SpectrumError(f"the method could not be registered with PEFT: {_problem!r}") from _problem
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


if TYPE_CHECKING:
    from .callback import SpectrumCallback
    from .config import SpectrumConfig
    from .errors import SpectrumError
    from .export import export_lora, merge_into_base
    from .loading import load_model_with_spectrum, quantization_config_for
    from .memory import estimate_memory, fit_to_memory
    from .optim import parameter_groups
    from .plan import make_plan
    from .probe import calibration_batches, probe_gradients
    from .records import GradientReport, Plan, SnrReport
    from .scan import scan_weights
    from .scanner import SpectrumScanner
    from .tuner import SpectrumModel
