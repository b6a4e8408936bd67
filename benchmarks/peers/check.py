"""Checks the peers on a tiny random model: what is kept, and what is measured. `make check`; a minute, no downloads."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from bench import Bench
from press import read_unit
from presses import METHODS, Budget
from reader import Reader, Reading
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

N_PREFIX, N_TOKENS, STOP, END = 5, 90, "w7", 3
QUESTIONS = [
    {"ids": [11, 12, 13], "teacher_ids": [], "reference_ids": [21, 22], "references": ["w17 w18"]},
    {"ids": [31, 32], "teacher_ids": [], "reference_ids": [23], "references": ["w19"]},
]


def main() -> None:
    """Run all checks."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        reader = Reader(folder, dtype="float32", device="cpu")
    text = torch.randint(10, 200, (N_PREFIX + N_TOKENS,)).tolist()
    check_entries(reader, text)
    check_answers(reader, text)
    print("all checks passed")


def save_model(folder: str) -> None:
    """A Qwen2 with weights drawn large enough that attention is uneven, and a tokenizer of numbered words."""
    vocab = {"<unk>": 0, "\n": 1, "<s>": 2, "</s>": END} | {f"w{i}": i + 4 for i in range(196)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=END,
        pad_token_id=END,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def check_entries(reader: Reader, text: list[int]) -> None:
    """Every press keeps the prefix, and exactly the entries of its budget; reusing held scores gives the same."""
    for name, recipe in METHODS.items():
        start_s, first = time.perf_counter(), None
        for n_kept in (45, 11, 3, 11):
            budget = Budget(n_prefix=N_PREFIX, n_tokens=N_TOKENS, n_kept=n_kept, tail_ids=(1,))
            reading = read_unit(reader, text, recipe, budget)
            shown = "" if reading.visible is None else " (masked)"
            if reading.visible is not None:
                assert all(bool(mask[:, :N_PREFIX].all()) for mask in reading.visible), name
            if n_kept == 11 and first is not None:
                assert same(first, reading), name
            first = reading if n_kept == 11 else first
        print(f"{name}: exact{shown}, {time.perf_counter() - start_s:.2f} s")


def same(one: Reading, other: Reading) -> bool:
    """Whether two readings are equal."""
    pairs = [(one.keys, other.keys), (one.values, other.values), (one.visible or (), other.visible or ())]
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


def check_answers(reader: Reader, text: list[int]) -> None:
    """Answers equal plain greedy decoding, and readings measured together equal each one alone."""
    questions = [one | {"teacher_ids": greedy(reader, [*text, *one["ids"]])} for one in QUESTIONS]
    bench = Bench(reader, text, questions, stop=[STOP], end_ids=[END], max_new_tokens=8)
    (full,) = bench.measure([bench.full])
    for said, one in zip(full, questions, strict=True):
        assert said.kl == 0 and said.text == reader.text(one["teacher_ids"], stop=[STOP]), said
    budget = Budget(n_prefix=N_PREFIX, n_tokens=N_TOKENS, n_kept=11, tail_ids=(1,))
    names = ("kvpress:kvzip", "kvpress:snapkv_short", "kvpress:adakv_expected_attention")
    readings = [reader.read(text[:N_PREFIX]), *(read_unit(reader, text, METHODS[name], budget) for name in names)]
    together = bench.measure(readings)
    for reading, answered in zip(readings, together, strict=True):
        (alone,) = bench.measure([reading])
        for one, other, question in zip(alone, answered, questions, strict=True):
            assert one.text == other.text == reader.text(follow(reader, reading, question["ids"]), stop=[STOP])
            assert abs(one.kl - other.kl) < 1e-4 and one.kl > 0


def greedy(reader: Reader, ids: list[int]) -> list[int]:
    """An answer, by prefilling everything again for each token."""
    answer: list[int] = []
    while len(answer) < 8 and not (answer and (answer[-1] == END or STOP in reader.text(answer, stop=[]))):
        logits = reader.model(torch.tensor([[*ids, *answer]]), use_cache=False).logits[0, -1]
        answer.append(pick(logits, answer))
    return answer


def follow(reader: Reader, reading: Reading, ids: list[int]) -> list[int]:
    """An answer behind a reading, by attention written out for each token of each layer."""
    answer: list[int] = []
    while len(answer) < 8 and not (answer and (answer[-1] == END or STOP in reader.text(answer, stop=[]))):
        answer.append(pick(written_out(reader.model, reading, [*ids, *answer]), answer))
    return answer


def pick(logits: torch.Tensor, answer: list[int]) -> int:
    """The likeliest token; the first one is neither the end nor the line break."""
    barred = [] if answer else [END, 1, 2]
    return int(logits.index_fill(0, torch.tensor(barred, dtype=torch.long), -torch.inf).argmax())


def written_out(model: Any, reading: Reading, ids: list[int]) -> torch.Tensor:
    """Logits behind the last token: Qwen2 without caches, masks of its own or kvpress."""
    x = model.model.embed_tokens(torch.tensor([ids]))
    positions = torch.arange(len(ids))[None] + reading.n_positions
    cos, sin = model.model.rotary_emb(x, positions)
    for index, layer in enumerate(model.model.layers):
        hidden, attention = layer.input_layernorm(x), layer.self_attn
        q, k, v = (
            project(hidden).view(len(ids), -1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotate(q, cos[0], sin[0]), rotate(k, cos[0], sin[0])
        out = torch.zeros_like(q)
        for head in range(q.shape[1]):
            own = head // attention.num_key_value_groups
            held = slice(None) if reading.visible is None else reading.visible[index][own]
            keys = torch.cat([reading.keys[index][0, own][held], k[:, own]])
            values = torch.cat([reading.values[index][0, own][held], v[:, own]])
            n_held = len(keys) - len(ids)
            for row in range(len(ids)):
                seen = n_held + row + 1
                weights = (keys[:seen] @ q[row, head] * attention.scaling).softmax(-1)
                out[row, head] = weights @ values[:seen]
        x = x + attention.o_proj(out.reshape(1, len(ids), -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: torch.Tensor = model.lm_head(model.model.norm(x))[0, -1]
    return logits


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `(n, num_heads, head_dim)`."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


if __name__ == "__main__":
    main()
