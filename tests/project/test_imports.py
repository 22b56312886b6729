"""What an import loads, and that PEFT learns of the method in whatever order packages are imported.

Each claim about imports is checked in a process of its own, by a checker that a negative control has seen failing.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import spectrum_peft
from spectrum_peft.errors import SpectrumError

# Prints which of the watched modules a program has loaded.
_REPORT = """
import json, sys
WATCHED = ("torch", "transformers", "transformers.modeling_utils", "peft", "trl", "matplotlib", "scipy", "datasets")
print("LOADED", json.dumps([name for name in WATCHED if name in sys.modules]))
"""


def run_python(program: str, *args: str) -> str:
    """Run a program in a fresh interpreter; returns its output, fails the test with its errors."""
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(program: str, *args: str) -> list[str]:
    line = run_python(program + _REPORT, *args).splitlines()[-1]
    assert line.startswith("LOADED ")
    return json.loads(line.removeprefix("LOADED "))


def test_importing_the_package_loads_no_heavy_library() -> None:
    assert loaded_by("import spectrum_peft") == []


@pytest.mark.slow
def test_the_checker_sees_a_library_that_is_loaded() -> None:
    assert loaded_by("import spectrum_peft, torch") == ["torch"]


def test_a_scan_from_the_command_line_imports_neither_peft_nor_modelling_code(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    program = "import sys; from spectrum_peft.cli.main import main; assert main(['scan', *sys.argv[1:]]) == 0"
    args = (str(tiny_llama_folder), "-o", str(tmp_path / "report.json"))
    loaded = loaded_by(program, *args)
    assert "torch" in loaded  # it did scan
    assert not {"peft", "transformers", "transformers.modeling_utils", "trl"} & set(loaded)


@pytest.mark.slow
def test_the_same_check_fails_where_transformers_is_imported_after_the_scan(tiny_llama_folder: Path) -> None:
    program = "import sys; from spectrum_peft.cli.main import main; main(['scan', sys.argv[1]]); import transformers"
    assert "transformers" in loaded_by(program, str(tiny_llama_folder))


@pytest.mark.parametrize("command", ["--help", "--version", "train --help", "plan --help", "demo --help"])
def test_help_loads_no_heavy_library(command: str) -> None:
    program = (
        "import sys; from spectrum_peft.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
    )
    assert loaded_by(program, *command.split()) == []


def test_a_plan_from_the_command_line_needs_no_torch(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from spectrum_peft import scan_weights

    report = scan_weights(str(tiny_llama_folder)).save(tmp_path / "report.json")
    program = "import sys; from spectrum_peft.cli.main import main; assert main(['plan', sys.argv[1]]) == 0"
    assert loaded_by(program, str(report)) == []


# --- public names ----------------------------------------------------------------------------------------------------


def test_every_public_name_is_served() -> None:
    for name in spectrum_peft.__all__:
        assert getattr(spectrum_peft, name) is not None
        assert name in dir(spectrum_peft)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'scann_weights'"):
        _ = spectrum_peft.scann_weights  # type: ignore[attr-defined]


def test_no_public_name_hides_a_module() -> None:
    modules = {path.stem for path in Path(spectrum_peft.__file__).parent.glob("*.py")}
    assert not modules & set(spectrum_peft.__all__)
    assert importlib.import_module("spectrum_peft.scan").scan_weights is spectrum_peft.scan_weights


# --- PEFT knows the method -------------------------------------------------------------------------------------------

_ORDERS = {
    "we come first": "import spectrum_peft, peft",
    "peft comes first": "import peft, spectrum_peft",
    "a name of ours brings peft": "from spectrum_peft import SpectrumConfig",
    "our config module brings peft": "import spectrum_peft.tuner.config",
    "our tuner brings peft": "import spectrum_peft.tuner",
    "a submodule of peft comes first": "import spectrum_peft, peft.tuners.lora",
    "trl brings peft": "import spectrum_peft; from trl import SFTTrainer",
    "transformers brings peft": "import spectrum_peft, transformers; transformers.Trainer; import peft",
    "trl has brought peft before": "from trl import SFTTrainer; import spectrum_peft",
}
_KNOWN = """
import sys, peft
config = peft.PeftConfig.from_pretrained(sys.argv[1])
print(type(config).__name__, config.peft_type.value)
"""


@pytest.fixture(scope="module")
def spectrum_adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SPECTRUM", "mode": "lora", "r": 4}))
    return str(folder)


@pytest.mark.parametrize(
    "order",
    [name if name == "we come first" else pytest.param(name, marks=pytest.mark.slow) for name in _ORDERS],
)
def test_peft_reads_our_adapters_when(order: str, spectrum_adapter: str) -> None:
    assert run_python(_ORDERS[order] + _KNOWN, spectrum_adapter).split() == ["SpectrumConfig", "SPECTRUM"]


@pytest.mark.slow
def test_peft_does_not_know_the_method_where_the_package_is_never_imported(spectrum_adapter: str) -> None:
    """The control of the test above, and what the README warns of."""
    program = "import sys, peft\ntry: peft.PeftConfig.from_pretrained(sys.argv[1])\nexcept KeyError as e: print(e)"
    assert run_python(program, spectrum_adapter).strip() == "'SPECTRUM'"


def test_a_registration_that_fails_does_not_break_the_import_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    _ = spectrum_peft.SpectrumConfig  # peft is there now
    monkeypatch.setitem(sys.modules, "spectrum_peft.tuner", None)  # makes its import fail
    spectrum_peft._peft_is_there(types.ModuleType("peft"))
    with pytest.raises(SpectrumError, match=r"could not be registered with PEFT: .*spectrum_peft\.tuner"):
        spectrum_peft.__getattr__("SpectrumConfig")
    assert spectrum_peft.__getattr__("make_plan") is not None  # what does not need PEFT goes on working


_SESSION = """
import sys
import spectrum_peft
import datasets, transformers
from trl import SFTConfig, SFTTrainer
from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum
transformers.utils.logging.disable_progress_bar()
options = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "learning_rate": 2e-4}
rows = datasets.Dataset.from_dict({"text": ["one and two"] * 4})
datasets.disable_progress_bars()
config = SpectrumConfig(mode="alors", r=2, task_type="CAUSAL_LM")
model, tokenizer = load_model_with_spectrum(sys.argv[1], config, dtype="float32")
args = SFTConfig(sys.argv[2], **options)
trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[SpectrumCallback()])
trainer.train()
trainer.save_model()
"""


def test_a_session_that_trains_warns_of_nothing(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """No line at import or in training that the user did not cause and cannot mend."""
    done = subprocess.run(
        [sys.executable, "-c", _SESSION, str(tiny_llama_folder), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("[transformers] The tokenizer has new")]
    assert said == []
