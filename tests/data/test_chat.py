"""Which tokens of a conversation carry loss: against templates that mark them themselves, and against what text says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import byte_tokenizer

from spectrum_peft.data.chat import IGNORED, assistant_spans, encode_row, render, turn_end
from spectrum_peft.errors import DataError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # those of the families, as their makers published them
# Family -> special tokens of its tokenizer.
FAMILIES = {
    "qwen2_5": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "qwen3_instruct_2507": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
# Written after the descriptions of the formats: SmolLM2 and ChatML; Mistral's instruct format; a header without specials.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{{ '## ' + m['role'] + '\\n' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '## assistant\\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4, of course"},
    {"role": "user", "content": "  And the assistant's 4, of course? é\n"},
    {"role": "assistant", "content": "Yes — 4.\n\nStill."},
]


def tokenizer_of(template: str, special: list[str]) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def learned(encoded: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """The stretches of text that carry loss."""
    found: list[list[int]] = [[]]
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        if label == IGNORED:
            found.append([])
        else:
            assert label == token
            found[-1].append(token)
    return [tokenizer.decode(ids) for ids in found if ids]


# The marked templates of the others write another text: thoughts in every turn, an end of text that carries loss.
SAME_TEXT = ("qwen2_5", "qwen3_instruct_2507", "llama3", "gemma")


@pytest.mark.parametrize("family", SAME_TEXT)
def test_what_the_assistant_wrote_is_found_where_a_template_does_not_mark_it(family: str) -> None:
    """The reference is the same family's template with TRL's marks, read by transformers."""
    plain = tokenizer_of((TEMPLATES / f"{family}.jinja").read_text(), FAMILIES[family])
    marked = tokenizer_of((TEMPLATES / f"{family}_training.jinja").read_text(), FAMILIES[family])
    found, wanted = (encode_row({"messages": CHAT}, t, "assistant") for t in (plain, marked))
    assert found["input_ids"] == wanted["input_ids"]
    assert [i.strip() for i in learned(found, plain)] == [i.strip() for i in learned(wanted, marked)]
    assert len(learned(found, plain)) == 2


@pytest.mark.parametrize(
    ("template", "special", "turns"),
    [
        (CHATML, FAMILIES["qwen3"], ["4, of course<|im_end|>", "Yes — 4.\n\nStill.<|im_end|>"]),
        (MISTRAL, [], [" 4, of course</s>", " Yes — 4.\n\nStill.</s>"]),
        (HEADERS, [], ["4, of course", "Yes — 4.\n\nStill."]),
        ("phi3", FAMILIES["phi3"], ["4, of course<|end|>", "Yes — 4.\n\nStill.<|end|>"]),
        (
            "qwen3",
            FAMILIES["qwen3"],
            ["4, of course<|im_end|>", "<think>\n\n</think>\n\nYes — 4.\n\nStill.<|im_end|>"],
        ),
    ],
)
def test_answers_carry_loss_with_the_token_that_ends_them(template: str, special: list[str], turns: list[str]) -> None:
    if template in FAMILIES:
        template = (TEMPLATES / f"{template}.jinja").read_text()
    tokenizer = tokenizer_of(template, special)
    encoded = encode_row({"messages": CHAT}, tokenizer, "assistant")
    assert learned(encoded, tokenizer) == turns
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    last = encode_row({"messages": CHAT}, tokenizer, "completion")
    assert learned(last, tokenizer) == turns[-1:]
    everything = encode_row({"messages": CHAT}, tokenizer, "all")
    assert everything["labels"] == everything["input_ids"] == encoded["input_ids"]


def test_prompt_and_completion_are_turns_where_there_is_a_template_and_are_joined_token_for_token_where_not() -> None:
    row = {"prompt": "one two", "completion": " three"}
    tokenizer = tokenizer_of(CHATML, FAMILIES["qwen3"])
    encoded = encode_row(row, tokenizer)
    assert learned(encoded, tokenizer) == [" three<|im_end|>"]
    for other in (encode_row(row, tokenizer, template=False), encode_row(row, tokenizer_of(None, []))):
        assert learned(other, tokenizer) == [" three</s>"]
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert other["input_ids"][: len(prompt)] == prompt
        assert other["labels"][: len(prompt)] == [IGNORED] * len(prompt)


def test_a_piece_never_merges_across_the_end_of_a_prompt() -> None:
    """A tokenizer with the piece 'ab': the prompt 'a' is what it is when it is asked, whatever follows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>")
    assert tokenizer("ab")["input_ids"] == [2]
    encoded = encode_row({"prompt": "a", "completion": "b"}, tokenizer)
    assert encoded == {"input_ids": [0, 1, 3], "labels": [IGNORED, 1, 3]}


def test_an_empty_answer_and_a_call_of_a_tool_carry_loss_to_the_end_of_their_turn() -> None:
    tokenizer = tokenizer_of((TEMPLATES / "qwen3.jinja").read_text(), FAMILIES["qwen3"])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chat = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        CHAT[1],
    ]
    first, second = learned(encode_row({"messages": chat}, tokenizer, "assistant"), tokenizer)
    assert '"name": "add"' in first
    assert first.endswith("</tool_call><|im_end|>")
    assert second.endswith("4, of course<|im_end|>")


def test_a_tokenizer_without_offsets_finds_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(CHATML, FAMILIES["qwen3"])
    fast = encode_row({"messages": CHAT}, tokenizer, "assistant")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encode_row({"messages": CHAT}, tokenizer, "assistant") == fast


def test_spans_are_of_the_text_that_the_template_writes() -> None:
    tokenizer = tokenizer_of(CHATML, FAMILIES["qwen3"])
    text = render(CHAT, {}, tokenizer, tokenize=False)
    spans = assistant_spans(CHAT, [1, 3], text, {}, tokenizer)
    assert [text[a:b] for a, b in spans] == ["4, of course<|im_end|>", "Yes — 4.\n\nStill.<|im_end|>"]
    assert turn_end(tokenizer) == "<|im_end|>"


def test_conversations_without_a_template_and_those_that_it_refuses_are_one_line() -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        encode_row({"messages": CHAT}, tokenizer_of(None, []))
    gemma = tokenizer_of((TEMPLATES / "gemma.jinja").read_text(), FAMILIES["gemma"])
    with pytest.raises(DataError, match=r"the chat template refuses a conversation .*System role not supported"):
        encode_row({"messages": [{"role": "system", "content": "be kind"}, *CHAT]}, gemma)
