"""A script: for each case a run to the end, a run that its process dies in, and that run resumed.

    python killed_runs.py OUT CASE [CASE ...]        CASE is mode, mode:nf4 or mode:plain

Writes OUT/CASE/whole.safetensors and OUT/CASE/resumed.safetensors: all parameters at the end. The processes are forked
after the imports, which take longer than the runs, and before torch has started a thread; each run has its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from conftest import byte_tokenizer
from running import QUIET, options_of, text_rows, values
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum
from spectrum_peft.plan import MODES

STEPS, SAVED_AT, DIES_AT, EXIT_CODE = 5, 2, 3, 17
# Ranks move after steps 1 and 3, that is before the checkpoint and after it.
OPTIONS: dict[str, dict[str, Any]] = {"alors": {"rescore_every": 1, "criterion": "spectrum"}}


class Dies(TrainerCallback):
    """Ends the process as a kill would: nothing is flushed, no `finally` runs."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == DIES_AT:
            os._exit(EXIT_CODE)


def run(
    folder: Path, case: str, out: Path, *, dies: bool = False, resume: Path | None = None
) -> dict[str, torch.Tensor]:
    mode, _, kind = case.partition(":")
    # Dropout: a resume that did not bring the random state back would end elsewhere.
    options = {**options_of(mode), **OPTIONS.get(mode, {}), "lora_dropout": 0.0 if MODES[mode].real_weights else 0.2}
    config = SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **options)
    extra: dict[str, Any] = {}
    callback = SpectrumCallback()
    start = 0 if resume is None else 1  # what new adapters hold is of no consequence for a resume
    if kind == "nf4":
        torch.manual_seed(start)
        model, _ = load_model_with_spectrum(str(folder), config, quantization="nf4", dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(start)
        if kind == "plain":
            callback = SpectrumCallback(config)
        else:
            extra = {"peft_config": config}
    steps = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED_AT, "learning_rate": 0.02}
    args = SFTConfig(output_dir=str(out), max_length=32, **{**QUIET, **steps})
    callbacks = [callback, *([Dies()] if dies else [])]
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=text_rows(), processing_class=byte_tokenizer(), callbacks=callbacks,
        **extra,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return values(trainer.model)


def forked(action: Any) -> int:
    """Exit code of a child process that does `action`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(out: Path, cases: list[str]) -> None:
    base = out / "base"
    assert forked(lambda: ARCHITECTURES["llama"].build().save_pretrained(base)) == 0
    for case in cases:
        here = out / case.replace(":", "-")
        here.mkdir(parents=True)
        died = here / "died"
        checkpoint = died / f"checkpoint-{SAVED_AT}"

        def whole(case: str = case, here: Path = here) -> None:
            save_file(run(base, case, here / "whole"), here / "whole.safetensors")

        def resumed(case: str = case, here: Path = here, checkpoint: Path = checkpoint) -> None:
            save_file(run(base, case, here / "resumed", resume=checkpoint), here / "resumed.safetensors")

        assert forked(whole) == 0, case
        assert forked(lambda case=case, died=died: run(base, case, died, dies=True)) == EXIT_CODE, case
        assert [p.name for p in died.glob("checkpoint-*")] == [checkpoint.name], case
        assert forked(resumed) == 0, case
        print(f"{case}: done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
