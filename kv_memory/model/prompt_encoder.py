"""PromptEncoder: texts to token ids, in the wrappers of a prompt form."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

from kv_memory.errors import UnreadableDocumentError
from kv_memory.model.loading import hash_tokenizer
from kv_memory.model.prompts import PromptForm


class PromptEncoder:
    """A tokenizer and a prompt form; the basis of `Backbone`. Safe to use from several threads.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Layout of prefix, documents and question.
    """

    def __init__(self, tokenizer: Any, prompt: PromptForm) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self._tokenizer_lock = threading.Lock()

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's vocabulary, merges and special tokens."""
        return hash_tokenizer(self.tokenizer)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """Token ids of the shared prefix, with the tokenizer's start token if the prompt form adds it."""
        ids = self.tokenizer(self.prompt.prefix, add_special_tokens=self.prompt.add_bos)["input_ids"]
        end = self.tokenizer.eos_token_id
        while len(ids) > 1 and ids[-1] == end and not self.prompt.prefix.endswith(self.tokenizer.eos_token or "\0"):
            ids = ids[:-1]  # some tokenizers append an end token to every text
        return tuple(ids)

    @cached_property
    def document_wrapper(self) -> tuple[list[int], list[int]]:
        """Token ids before and after each document."""
        return self.encode(self.prompt.document_before), self.encode(self.prompt.document_after)

    def _tokenize(self, text: str | list[str], **options: bool) -> Any:
        with self._tokenizer_lock:  # options are part of the tokenizer's state during a call
            try:
                return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)
            except TypeError as error:  # from the tokenizers library, for half a surrogate pair
                raise UnreadableDocumentError(
                    "the text has half a surrogate pair",
                    where=repr(text)[:80],
                    next_step='Replace it: text.encode(errors="replace").decode().',
                ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        ids: list[int] = self._tokenize(text)["input_ids"]
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of untrusted text: a spelled-out special token (`<|im_end|>`) stays text and cannot end a turn."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids as in `encode_text`, and the span of characters of each token."""
        encoded = self._tokenize(text, split_special_tokens=True, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def spells_special(self, text: str) -> bool:
        """Whether `encode` would find a special token in the text."""
        return any(token in text for token in self._special_tokens)

    @cached_property
    def _special_tokens(self) -> frozenset[str]:
        # `all_special_tokens` alone is not enough: it lists tokens with a role, and Llama 3's `<|start_header_id|>` has
        # no role.
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        named = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return frozenset(token for token in named if token)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Number of tokens of each text, as in `encode_text`; one call for many texts is fast."""
        if not texts:
            return []
        encoded = self._tokenize(texts, split_special_tokens=True)
        return [len(ids) for ids in encoded["input_ids"]]

    def encode_document(self, text: str) -> list[int]:
        """Token ids of a document in its wrapper; wrapper and text are tokenised separately."""
        before, after = self.document_wrapper
        return before + self.encode_text(text) + after

    def encode_question(self, question: str) -> list[int]:
        """Token ids of a question in its wrapper."""
        form = self.prompt
        if not self.spells_special(question):
            return self.encode(form.question(question))  # tokenised in one piece, like the worked examples
        text = self.encode_text(question.strip())
        return self.encode(form.question_before) + text + self.encode(form.question_after)
