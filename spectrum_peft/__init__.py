"""Selective fine-tuning by weight spectrum: scan a checkpoint, plan what trains, train it, export it.

Public names are imported on first use (PEP 562): `import spectrum_peft` loads neither torch, transformers nor peft. It
does make the method known to PEFT, whenever peft is imported, before or after this package and by whomever.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

# Public name -> module that defines it.
_MODULE_OF = {
    "GradientReport": "records",
    "LearningRateRace": "train.rate_race",
    "Plan": "plan",
    "SnrReport": "records",
    "SpectrumCallback": "train.callback",
    "SpectrumConfig": "tuner.config",
    "SpectrumError": "errors",
    "SpectrumModel": "tuner",
    "SpectrumScanner": "scanner",
    "calibration_batches": "probe",
    "estimate_memory": "memory",
    "export_gguf": "export",
    "export_lora": "export",
    "find_report": "scan",
    "fit_to_memory": "memory",
    "load_model_with_spectrum": "tuner.loading",
    "make_plan": "plan",
    "merge_into_base": "export",
    "parameter_groups": "train.optim",
    "probe_gradients": "probe",
    "push_folder": "push",
    "push_model": "tuner.pushing",
    "quantization_config_for": "tuner.loading",
    "scan_weights": "scan",
    "tune": "cli.tune",
}
# Modules whose names are of no use while PEFT does not know the method.
_ON_PEFT = frozenset({"memory", "train.callback", "tuner", "tuner.config", "tuner.loading", "tuner.pushing"})

__all__ = sorted(_MODULE_OF)


# bitsandbytes asks for an optional kernel when it is imported, and reports that it is not there: nobody has asked for it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))


def _register() -> Exception | None:
    """Import the tuner, which registers itself with PEFT; what went wrong. Never raises: it runs inside `import peft`."""
    try:
        importlib.import_module(f"{__name__}.tuner")
    except Exception as error:
        return error
    return None


@wrapt.when_imported("peft")
def _peft_is_there(_: ModuleType) -> None:
    _register()


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if module in _ON_PEFT and (problem := _register()) is not None:
        from .errors import SpectrumError

        raise SpectrumError(f"the method could not be registered with PEFT: {problem!r}") from problem
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


if TYPE_CHECKING:
    from .cli.tune import tune
    from .errors import SpectrumError
    from .export import export_gguf, export_lora, merge_into_base
    from .memory import estimate_memory, fit_to_memory
    from .plan import make_plan
    from .probe import calibration_batches, probe_gradients
    from .push import push_folder
    from .records import GradientReport, Plan, SnrReport
    from .scan import find_report, scan_weights
    from .scanner import SpectrumScanner
    from .train.callback import SpectrumCallback
    from .train.optim import parameter_groups
    from .train.rate_race import LearningRateRace
    from .tuner import SpectrumModel
    from .tuner.config import SpectrumConfig
    from .tuner.loading import load_model_with_spectrum, quantization_config_for
    from .tuner.pushing import push_model
