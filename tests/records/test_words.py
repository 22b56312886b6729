"""What a notebook shows of a plan and of a report; keywords that are nearly right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, make_plan
from spectrum_peft.errors import OptionError
from spectrum_peft.plan import explain
from spectrum_peft.records import SnrReport


def test_a_plan_explains_itself_as_the_command_line_does(llama_report: Callable[..., SnrReport]) -> None:
    report = llama_report()
    plan = make_plan(report, spectrum_ratio=0.5)
    assert plan.explain() == explain(plan)
    assert plan.explain(report) == explain(plan, report) != plan.explain()
    shown = replace(plan, notes=("a < b",))._repr_html_()
    assert shown.startswith("<pre>Mode spectrum") and shown.endswith("- a &lt; b</pre>")


def test_a_report_shows_each_kind_with_its_scores(llama_report: Callable[..., SnrReport]) -> None:
    report = replace(llama_report(), model_id="<b>mine</b>")
    shown = report._repr_html_()
    assert "&lt;b&gt;mine&lt;/b&gt;" in shown and "<b>" not in shown
    kinds = {s.kind for s in report.stats if s.score is not None}
    assert shown.count("<tr>") == len(kinds) + 1
    for kind in kinds:
        scores = [s.score for s in report.stats if s.kind == kind and s.score is not None]
        row = f"<td>{kind}</td><td>{len(scores)}</td><td>{min(scores):.4g} to {max(scores):.4g}</td>"
        assert row in shown


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rank", "'r'"),
        ("spectrum_rato", "'spectrum_ratio'"),
        ("lora_alfa", "'lora_alpha'"),
        ("ratio", "'spectrum_ratio'"),
    ],
)
def test_a_field_that_is_nearly_right_is_named(name: str, near: str) -> None:
    with pytest.raises(OptionError, match=rf"SpectrumConfig has no field '{name}'\. Did you mean .*{near}"):
        SpectrumConfig(**{name: 8})
    with pytest.raises(TypeError):  # what PEFT expects of a call, so that it can leave out fields of a newer version
        SpectrumConfig(**{name: 8})


def test_a_keyword_of_the_loader_that_is_nearly_right_is_named() -> None:
    with pytest.raises(OptionError, match=r"'quantisation' is not known\. Did you mean 'quantization'"):
        load_model_with_spectrum("nowhere", quantisation="nf4")
