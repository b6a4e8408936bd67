from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.compress import Compressor
from kv_memory.config import DecodeSettings
from kv_memory.generate import Generator, Turn, encode_turns
from kv_memory.generate.turns import Prompt
from kv_memory.model.backbone import Backbone
from kv_memory.model.first_token import FirstToken, first_visible, is_visible
from kv_memory.model.prompts import PromptForm
from tests.conftest import SHORT_FORM, make_model, make_tokenizer
from tests.reference import letters

TOKENIZER = make_tokenizer()
END = 2
SETTINGS = DecodeSettings(max_new_tokens=6)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


NEWLINE, SPACE, LETTER = (ids_of(text)[0] for text in ("\n", " ", "x"))


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u00a0", "\u3000", "\u200b\ufeff", "\x00\x1b", "\u2028", "\u00ad"])
def test_text_without_visible_characters_is_invisible(text: str) -> None:
    assert not is_visible(text) and first_visible(text) == len(text)
    assert is_visible(text + ".") and first_visible(f"{text}x") == len(text)


@pytest.mark.parametrize("text", ["x", ".", "é", "日", "🙂", "\ufffd"])
def test_text_with_a_visible_character_is_visible(text: str) -> None:
    assert is_visible(text) and first_visible(f" \n{text}") == 2


# -- picking -----------------------------------------------------------------------------------------------------------


def opening(behind: str | None = ":") -> FirstToken:
    return FirstToken(tokenizer=TOKENIZER, end_ids=[END], behind=ids_of(behind)[-1] if behind else None)


def logits_of(*ranked: int) -> torch.Tensor:
    """Logits in which these tokens lead, in this order, and all others cannot be."""
    logits = torch.full((300,), -torch.inf)
    logits[list(ranked)] = torch.arange(len(ranked), 0, -1.0)
    return logits


def likeliest(logits: torch.Tensor) -> int:
    return int(logits.argmax())


def test_the_most_likely_visible_token_is_picked() -> None:
    logits = logits_of(NEWLINE, END, 0, 299, ids_of("\x07")[0], LETTER, ids_of("y")[0])
    before = logits.clone()
    assert opening().pick(likeliest, logits, []) == LETTER
    assert torch.equal(logits, before)


def test_one_leading_space_is_allowed_unless_the_prompt_ends_in_one() -> None:
    logits = logits_of(SPACE, LETTER)
    assert opening(":").pick(likeliest, logits, []) == SPACE
    assert opening(":").pick(likeliest, logits, [SPACE]) == LETTER
    assert opening(":").pick(likeliest, logits, [], is_last=True) == LETTER
    for behind in ("\n", " ", None):
        assert opening(behind).pick(likeliest, logits, []) == LETTER


def test_byte_tokens_do_not_complete_an_invisible_character() -> None:
    first, second, third = ids_of("\u200b")  # e2 80 8b
    dagger = ids_of("†")[2]
    one = opening()
    assert one.pick(likeliest, logits_of(first, LETTER), []) == first
    assert one.pick(likeliest, logits_of(third, dagger), [first, second]) == dagger


def test_half_a_character_does_not_begin_the_answer() -> None:
    half = ids_of("†")[:2]
    assert not opening().has_begun(half) and opening().has_begun([LETTER, *half]) and opening().has_begun(ids_of("†"))


def test_without_visible_candidates_the_first_pick_is_used() -> None:
    assert opening().pick(likeliest, logits_of(NEWLINE, END), []) == NEWLINE


def test_samples_are_drawn_from_visible_tokens() -> None:
    torch.manual_seed(0)
    y = ids_of("y")[0]
    logits = torch.full((300,), -torch.inf)
    logits[[NEWLINE, END, LETTER, y]] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    picks = [opening().pick(lambda row: int(torch.multinomial(row.softmax(-1), 1)), logits, []) for _ in range(400)]
    assert set(picks) == {LETTER, y}
    assert 0.67 < picks.count(LETTER) / len(picks) < 0.83  # three in four, as without the others


def test_greedy_returns_the_token_decoding_would_take_at_each_place() -> None:
    y = ids_of("y")[0]
    rows = torch.stack([logits_of(NEWLINE, LETTER), logits_of(NEWLINE, LETTER)])
    assert opening().greedy(rows, [LETTER, NEWLINE]) == [LETTER, NEWLINE]
    assert opening().greedy(rows, [y, LETTER]) == [LETTER, NEWLINE]  # an answer that has begun takes the likeliest
    assert opening().greedy(rows, [SPACE, LETTER]) == [LETTER, LETTER]
    assert opening().greedy(rows[:0], []) == []


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blank() -> Iterator[Backbone]:
    """A model that would begin every answer with a line break, then an end token; a line break is its stop string."""
    model = make_model("llama")
    head = model.get_output_embeddings()
    forward = head.forward

    def pushed(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = forward(hidden).clone()
        logits[..., NEWLINE] = logits.amax() + 100
        logits[..., END] = logits.amax() - 1
        return logits

    head.forward = pushed
    yield Backbone(model, make_tokenizer(), prompt=PromptForm(**SHORT_FORM, stop=("\n",)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "top_p": 0.1, "seed": 3}]
)
def test_no_answer_is_empty(blank: Backbone, options: dict[str, Any]) -> None:
    cache = Compressor(blank, selector="sink_recent").compress(letters(30), keep_ratio=1.0)
    generator, settings = Generator(blank), replace(SETTINGS, **options)
    one = generator.generate("why?", [cache], settings=settings)
    assert is_visible(one.text) and one.finish_reason == "stop" and one.token_ids[-1] == NEWLINE
    assert one.next_step is None
    # Batches, streams and the text baseline follow the same rule.
    batch = generator.generate_batch(["why?", "who was that then?"], [cache], settings=settings)
    assert batch[0].token_ids == one.token_ids and is_visible(batch[1].text)
    assert "".join(generator.stream("why?", [cache], settings=settings)) == one.text
    assert generator.stream("why?", texts=[letters(30)], settings=settings).answer.token_ids == one.token_ids


def test_answers_to_turns_and_raw_prompts_begin_visibly(blank: Backbone) -> None:
    for prompt in (
        encode_turns(blank, [Turn("user", "why?")]),
        Prompt(blank.encode("Once upon a time\n"), behind_prefix=False),
    ):
        assert is_visible(Generator(blank).reply(prompt, settings=SETTINGS).answer.text)


def test_constrained_json_is_valid_from_the_first_token(blank: Backbone) -> None:
    schema = {"type": "string", "maxLength": 3}
    answer = Generator(blank).generate("why?", settings=replace(SETTINGS, json_schema=json.dumps(schema)))
    assert isinstance(json.loads(answer.text), str)


def test_a_one_token_answer_is_visible(blank: Backbone) -> None:
    assert is_visible(Generator(blank).generate("why?", settings=DecodeSettings(max_new_tokens=1)).text)


def test_an_empty_answer_has_a_next_step(blank: Backbone) -> None:
    first = Generator(blank).generate("why?", settings=SETTINGS).text.strip()[0]
    answer = Generator(blank).generate("why?", settings=replace(SETTINGS, stop=(first,)))
    assert not answer.text.strip() and answer.finish_reason == "stop"
    assert answer.next_step is not None and repr(first) in answer.next_step
