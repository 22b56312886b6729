"""Text that a model writes: its answers are found, batches change nothing, and the metrics are those of their sources."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import byte_tokenizer
from datasets import Dataset

from spectrum_peft.errors import DataError, InstallError, OptionError
from spectrum_peft.train import generation


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### $12.50", "12.5"),
        ("#### 12.00", "12"),
        ("#### -3", "-3"),
        ("#### -0", "0"),
        ("#### 007", "7"),
        ("#### .5", "0.5"),
        ("#### 100", "100"),
        ("#### 3\nno, wait\n#### 4", "4"),
        ("####5 apples", "5"),
        ("the answer is 5", None),
        ("#### five", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_number_after_the_last_mark(text: str, answer: str | None) -> None:
    assert generation.final_answer(text) == answer


def test_exact_match_counts_answers_and_not_what_leads_to_them() -> None:
    found = generation.exact_match(["so #### 5.0", "#### 6", "5"], ["#### 5", "#### 7", "#### 5"])
    assert found == {"exact_match": 1 / 3, "answered": 2 / 3}


def test_exact_match_compares_the_text_where_the_reference_ends_in_no_number() -> None:
    given = [" Paris\n", "paris", "", "New  York", "so #### 5", "it is 5"]
    wanted = ["Paris", "Paris", "Paris", "New York", "#### 5", "#### 5"]
    assert generation.exact_match(given, wanted) == {"exact_match": 3 / 6, "answered": 4 / 6}


def _lcs(a: list[str], b: list[str]) -> int:
    """Longest common subsequence, by its recursion."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + _lcs(a[:-1], b[:-1])
    return max(_lcs(a[:-1], b), _lcs(a, b[:-1]))


@pytest.mark.parametrize(
    ("completion", "reference"),
    [("the cat sat", "the cat sat"), ("a dog ran far", "the cat sat"), ("cat the sat on", "the cat sat on a mat")],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(completion: str, reference: str) -> None:
    pytest.importorskip("rouge_score")
    given, wanted = completion.split(), reference.split()
    common = _lcs(given, wanted)
    p, r = common / len(given), common / len(wanted)
    expected = 2 * p * r / (p + r) if common else 0.0
    assert generation.rouge_l([completion], [reference])["rouge_l"] == pytest.approx(expected)
    both = generation.rouge_l([completion, reference], [reference, reference])["rouge_l"]
    assert both == pytest.approx((expected + 1) / 2)


def test_a_missing_package_and_an_unknown_metric_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InstallError, match=r"pip install 'spectrum-peft\[eval\]'"):
        generation.check_metric("rouge_l")
    with pytest.raises(OptionError, match=r"metric is 'exact'\. Did you mean 'exact_match'"):
        generation.check_metric("exact")


@pytest.fixture(scope="module")
def llama() -> Any:
    model = ARCHITECTURES["llama"].build()
    torch.manual_seed(1)
    for parameter in model.parameters():  # a model that has opinions, so that a wrong position shows
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


PROMPTS = ["a", "a much longer prompt than the first", "two words", "x y z"]


def test_a_batch_writes_what_each_prompt_alone_gives(llama: Any) -> None:
    tokenizer = byte_tokenizer()
    together = generation.complete(llama, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    alone = [generation.complete(llama, tokenizer, [p], max_new_tokens=12, batch_size=1)[0] for p in PROMPTS]
    assert together == alone
    assert len(set(together)) == len(PROMPTS)
    assert tokenizer.padding_side == byte_tokenizer().padding_side


def test_completions_are_greedy_and_without_the_prompt(llama: Any) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("two words", return_tensors="pt")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, llama(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[0, len("two words") :], skip_special_tokens=True)
    assert generation.complete(llama, tokenizer, ["two words"], max_new_tokens=12) == [expected]


def test_a_decoder_of_an_encoder_writes_its_own_text() -> None:
    model, tokenizer = ARCHITECTURES["t5"].build(), byte_tokenizer()
    texts = generation.complete(model, tokenizer, PROMPTS[:2], max_new_tokens=6)
    alone = generation.complete(model, tokenizer, PROMPTS[1:2], max_new_tokens=6)
    assert texts[1] == alone[0]


def test_prompts_are_those_that_the_trainer_shows() -> None:
    tokenizer = byte_tokenizer()
    plain = Dataset.from_dict({"prompt": ["a?"], "completion": ["b"]})
    assert generation.prompts_of(plain, tokenizer, "d") == (["<s>user: a?</s><s>assistant: "], ["b"], True)
    chat = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    wanted = ["<s>user: a?</s><s>assistant: "], ["b"], True
    assert generation.prompts_of(plain, tokenizer, "d", template=False) == (["a?"], ["b"], False)
    assert generation.prompts_of(Dataset.from_dict({"messages": [chat]}), tokenizer, "d") == wanted
    both = Dataset.from_dict({"prompt": [chat[:1]], "completion": [chat[1:]]})
    assert generation.prompts_of(both, tokenizer, "d") == wanted
    with pytest.raises(DataError, match="d: generation needs prompt and completion"):
        generation.prompts_of(Dataset.from_dict({"text": ["a"]}), tokenizer, "d")


def test_speed_is_of_as_many_tokens_as_were_asked_for(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    original = llama.generate

    def generate(**inputs: Any) -> Any:
        output = original(**inputs)
        lengths.append(output.shape[1] - inputs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(llama, "generate", generate)
    found = generation.speed(llama, byte_tokenizer(), "a", tokens=5, repeats=3)
    assert lengths == [2, 5, 5, 5]
    assert found["tokens_per_second"] == sorted(found["repeats"])[1] > 0
