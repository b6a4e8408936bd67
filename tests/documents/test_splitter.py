from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_memory.documents import split_passages
from kv_memory.errors import ConfigError


def count_words(texts: list[str]) -> list[int]:
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def count_characters(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def count_quarters(texts: list[str]) -> list[int]:
    """One more than a quarter of the bytes: not additive, as with a tokenizer that puts a space in front."""
    return [1 + len(text.encode()) // 4 for text in texts]


def count_joined(texts: list[str]) -> list[int]:
    """More tokens together than apart, which no estimate from parts foresees."""
    return [len(text.split()) + text.count("\n") ** 2 for text in texts]


def solid(text: str) -> str:
    return "".join(text.split())


WORDS = ["word", "Eins zwei.", "x" * 40, "日本語。", "e\u0301", "a.b! c? d", "- item", "`inline`", "😀" * 9]
MARKUP = ["# Heading", "#", "```", "```py", "~~~", "===", "---", "    indented"]
SPACES = ["\n", "\n\n", "\r\n", " ", "\t", "\x0b", "\u2028", " " * 30]
PIECES = st.sampled_from(WORDS + MARKUP + SPACES)
TEXTS = st.one_of(st.lists(PIECES, max_size=60).map("".join), st.lists(PIECES, max_size=40).map("\n".join), st.text())


@pytest.mark.parametrize("count", [count_words, count_characters, count_quarters, count_joined])
@given(text=TEXTS, max_tokens=st.integers(2, 60))
@settings(max_examples=150, deadline=None)
def test_every_character_is_kept_once_and_no_passage_is_too_long(count, text, max_tokens):
    passages = split_passages(text, max_tokens=max_tokens, count_tokens=count)
    assert solid("".join(passages)) == solid(text)
    assert all(passage.strip() for passage in passages)
    assert max(count(passages), default=0) <= max_tokens
    assert passages == split_passages(text, max_tokens=max_tokens, count_tokens=count)


@given(text=TEXTS)
def test_without_a_limit_the_text_is_one_passage(text):
    passages = split_passages(text, max_tokens=None, count_tokens=count_words)
    assert passages == ([text.strip()] if text.strip() else [])


@given(text=TEXTS)
def test_a_text_that_fits_is_one_passage(text):
    passages = split_passages(text, max_tokens=100_000, count_tokens=count_words)
    assert passages == ([text.strip()] if text.strip() else [])


def test_splits_at_paragraphs_and_fills_passages():
    paragraphs = [f"Paragraph {i} has six words here." for i in range(6)]  # 7 tokens each
    passages = split_passages("\n\n".join(paragraphs), max_tokens=15, count_tokens=count_words)
    assert passages == ["\n\n".join(paragraphs[i : i + 2]) for i in (0, 2, 4)]


def test_a_heading_stays_with_the_text_below_it():
    text = "one two three four five six\n\n# Title\n\n## Under it\n\nalpha beta gamma delta"
    passages = split_passages(text, max_tokens=12, count_tokens=count_words)
    assert passages == ["one two three four five six", "# Title\n\n## Under it\n\nalpha beta gamma delta"]


def test_an_underlined_heading_stays_with_the_text_below_it():
    text = "one two three four five six\n\nTitle\n~~~~~\n\nalpha beta gamma delta"
    passages = split_passages(text, max_tokens=12, count_tokens=count_words)
    assert passages[0] == "one two three four five six"


def test_a_heading_stays_with_the_first_sentence_of_a_long_paragraph():
    text = "a b c d e f g h.\n\n# 1. Title\n\n" + " ".join(f"Sentence number {i} is here." for i in range(6))
    passages = split_passages(text, max_tokens=14, count_tokens=count_words)
    assert passages[1].startswith("# 1. Title\n\nSentence number 0 is here.")


def test_code_block_stays_whole_if_it_fits():
    code = "```python\nx = 1\n\n# no heading. Really\n\ny = 2\n```"  # 16 tokens, with blank lines inside
    text = f"Some words stand before it and take room.\n\n{code}\n\nAnd some after it."
    passages = split_passages(text, max_tokens=24, count_tokens=count_words)
    assert any(code in passage for passage in passages)
    assert len(passages) == 2


def test_long_code_block_is_split_at_lines_and_keeps_indentation():
    lines = [f"    value_{i} = call({i}). attribute" for i in range(20)]
    text = "```\ndef f():\n" + "\n".join(lines) + "\n```"
    passages = split_passages(text, max_tokens=40, count_tokens=count_words)
    assert len(passages) > 2
    assert "\n".join(passages) == text  # no line is cut, and the passages begin with their spaces


def test_inline_code_in_backticks_does_not_start_a_block():
    text = "```inline``` is code\n\nsecond part here\n\nthird part here"
    passages = split_passages(text, max_tokens=10, count_tokens=count_words)
    assert passages[-1] == "third part here" or passages[-1].endswith("second part here\n\nthird part here")
    assert len(passages) == 2


def test_long_paragraph_is_split_at_sentence_ends():
    sentences = [f"This is sentence number {i}." for i in range(10)]  # 6 tokens each
    passages = split_passages(" ".join(sentences), max_tokens=12, count_tokens=count_words)
    assert passages == [" ".join(sentences[i : i + 2]) for i in range(0, 10, 2)]


def test_chinese_sentences_end_without_a_space():
    sentences = ["今天天气很好。", "我们去公园吧\uff01", "你觉得怎么样\uff1f"]
    passages = split_passages("".join(sentences), max_tokens=8, count_tokens=count_characters)
    assert passages == sentences


def test_paragraph_without_sentences_is_split_at_lines():
    lines = [f"- item {i} of the list" for i in range(8)]  # 6 tokens each
    passages = split_passages("\n".join(lines), max_tokens=12, count_tokens=count_words)
    assert passages == ["\n".join(lines[i : i + 2]) for i in range(0, 8, 2)]


def test_line_without_sentences_is_split_at_words():
    words = [f"word{i}" for i in range(100)]
    passages = split_passages(" ".join(words), max_tokens=7, count_tokens=count_words)
    assert [word for passage in passages for word in passage.split()] == words


def test_word_that_does_not_fit_is_split_at_characters():
    passages = split_passages("x" * 100, max_tokens=8, count_tokens=count_characters)
    assert "".join(passages) == "x" * 100
    assert max(map(len, passages)) <= 8


def test_tiny_last_passage_is_merged_or_balanced_with_the_previous_one():
    paragraphs = [" ".join(["word"] * 10)] * 4 + ["end"]
    passages = split_passages("\n\n".join(paragraphs), max_tokens=40, count_tokens=count_words)
    assert len(passages) == 2
    assert min(count_words(passages)) >= 20


def test_character_with_more_tokens_than_the_limit_is_an_error():
    with pytest.raises(ConfigError, match="'😀'") as caught:
        split_passages("ab 😀", max_tokens=3, count_tokens=lambda texts: [len(t.encode()) for t in texts])
    assert caught.value.next_step


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_limit_below_one_is_an_error(max_tokens):
    with pytest.raises(ConfigError, match="max_tokens"):
        split_passages("text", max_tokens=max_tokens, count_tokens=count_words)


@pytest.mark.parametrize("kind", ["prose", "one line", "no spaces", "short lines"])
def test_a_long_text_takes_a_few_seconds_and_a_dozen_calls(kind):
    sentence = "The quick brown fox jumps over the lazy dog. "
    text = {
        "prose": ((sentence * 8).strip() + "\n\n") * 2800,
        "one line": sentence.replace(".", "") * 22_000,
        "no spaces": "x" * 1_000_000,
        "short lines": "ab\n" * 100_000,
    }[kind]
    calls = []

    def count(texts: list[str]) -> list[int]:
        calls.append(max(map(len, texts)))
        return [len(t) // 4 for t in texts]

    started = time.perf_counter()
    passages = split_passages(text, max_tokens=256, count_tokens=count)
    assert time.perf_counter() - started < 10
    assert len(calls) <= 12
    assert max(calls) <= 256 * 32  # no tokenizer is given the whole megabyte as one string
    assert solid("".join(passages)) == solid(text)
