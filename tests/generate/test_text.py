from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_memory.generate.text_stream import TextStream
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()
END = 2
BLANK = "".join(map(chr, [*range(33), *range(127, 161), 0xAD]))  # of the characters that two bytes can make


def feed(ids: Sequence[int], *, stop: Sequence[str] = ()) -> tuple[TextStream, list[str]]:
    """Push tokens until the stream is finished, as the decoding loop does."""
    stream, pieces = TextStream(TOKENIZER, stop=stop), []
    for number, token in enumerate(ids, start=1):
        pieces.append(stream.push(token, is_end=token == END, is_last=number == len(ids) and token != END))
        if stream.finished:
            break
    return stream, pieces


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def test_plain_text_is_returned_token_by_token() -> None:
    stream, pieces = feed(ids_of("abc"))
    assert pieces == ["a", "b", "c"]
    assert (stream.text, stream.finish_reason) == ("abc", "length")


def test_the_end_token_is_recorded_but_not_shown() -> None:
    stream, pieces = feed([*ids_of("ab"), END, *ids_of("c")])
    assert pieces == ["a", "b", ""]
    assert (stream.text, stream.finish_reason, stream.token_ids[-1]) == ("ab", "stop", END)


def test_a_stop_string_over_several_tokens_is_held_back() -> None:
    stream, pieces = feed(ids_of("x\n\nQ: y"), stop=["\n\nQ:"])
    assert pieces == ["x", "", "", "", ""]
    assert (stream.text, stream.finish_reason) == ("x", "stop")
    assert len(stream.token_ids) == 5  # nothing is decoded behind it


def test_an_unfinished_stop_string_is_released_later() -> None:
    stream, pieces = feed(ids_of("x\n\nQ? y"), stop=["\n\nQ:"])
    assert pieces == ["x", "", "", "", "\n\nQ?", " ", "y"]
    assert stream.finish_reason == "length"


def test_a_partial_stop_string_at_the_end_is_text() -> None:
    assert feed(ids_of("x\n\nQ"), stop=["\n\nQ:"])[1] == ["x", "", "", "\n\nQ"]
    assert feed([*ids_of("x\n\nQ"), END], stop=["\n\nQ:"])[1] == ["x", "", "", "", "\n\nQ"]


def test_a_stop_string_may_end_with_the_last_token() -> None:
    stream, pieces = feed(ids_of("xab"), stop=["ab"])
    assert ("".join(pieces), stream.text, stream.finish_reason) == ("x", "x", "stop")


def test_a_stop_string_does_not_count_before_the_first_visible_character() -> None:
    stream, pieces = feed(ids_of(" \n\nx\ny"), stop=["\n", "\n\n", " \n"])
    assert ("".join(pieces), stream.text, stream.finish_reason) == (" \n\nx", " \n\nx", "stop")
    assert stream.begun and stream.next_step is None


def test_a_visible_stop_string_counts_from_the_first_character() -> None:
    for text in ("Q: x", "\nQ: x"):
        stream, pieces = feed(ids_of(text), stop=["\nQ:", "Q:"])
        assert ("".join(pieces), stream.text.strip(), stream.finish_reason) == ("", "", "stop")
        assert "the stop string" in (stream.next_step or "") and "Q:'" in (stream.next_step or "")


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([*ids_of("\n"), END], "Rephrase the question"),
        ([END], "Rephrase the question"),
        (ids_of(" "), "max_new_tokens"),
    ],
)
def test_an_empty_answer_has_a_next_step(ids: list[int], said: str) -> None:
    stream, _ = feed(ids, stop=["\n"])
    assert not stream.text.strip() and said in (stream.next_step or "")


def test_an_unfinished_answer_has_no_next_step() -> None:
    stream = TextStream(TOKENIZER)
    stream.push(ids_of(" ")[0], is_end=False, is_last=False)
    assert stream.next_step is None


@pytest.mark.parametrize("text", ["é", "日本", "🙂", "a🙂b"])
def test_a_character_is_returned_when_all_its_bytes_are_decoded(text: str) -> None:
    _, pieces = feed(ids_of(text))
    assert [piece for piece in pieces if piece] == list(text)
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(text.encode())


def test_an_incomplete_character_at_the_end_is_kept() -> None:
    half = ids_of("a🙂")[:-1]
    for ids in (half, [*half, END]):
        stream, pieces = feed(ids)
        assert "".join(pieces) == stream.text == TOKENIZER.decode(half)
        assert stream.text.startswith("a\ufffd")


def test_a_stop_string_can_be_a_multi_byte_character() -> None:
    stream, pieces = feed(ids_of("a🙂b"), stop=["🙂"])
    assert ("".join(pieces), stream.text, stream.finish_reason) == ("a", "a", "stop")


@settings(deadline=None, max_examples=200)
@given(
    ids=st.lists(st.one_of(st.integers(3, 258), st.sampled_from(ids_of("ab\n🙂é"))), min_size=1, max_size=25),
    stop=st.lists(st.text(alphabet="ab\n🙂", min_size=1, max_size=3), max_size=2),
    ends=st.booleans(),
)
def test_joined_pieces_equal_the_text_up_to_the_first_stop(ids: list[int], stop: list[str], ends: bool) -> None:
    stream, pieces = feed([*ids, END] if ends else ids, stop=stop)
    assert "".join(pieces) == stream.text
    read = [token for token in stream.token_ids if token != END]
    whole = TOKENIZER.decode(read)
    first = len(whole) - len(whole.lstrip(BLANK))
    places = [(i, one) for one in stop for i in range(len(whole)) if whole.startswith(one, i)]
    cuts = [i for i, one in places if i + len(one) > first]  # none ends before the first visible character
    assert stream.text == (whole[: min(cuts)] if cuts else whole)
    assert stream.finish_reason == ("stop" if cuts or END in stream.token_ids else "length")
    if not cuts:
        assert read == ids  # nothing else stops early
    else:  # and a stop string behind the first visible character stops at once
        early = TOKENIZER.decode(read[:-4])
        assert not any(early.startswith(one, i) and i + len(one) > first for one in stop for i in range(len(early)))
