"""Prompt forms: the shared prefix, the wrapper around each document, the wrapper around the question; their token ids.

A form is text only. Its three pieces are tokenised separately, so that no token spans a boundary. The prefix is
prefilled once and shared by all documents.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from kv_memory.errors import ConfigError, UnreadableDocumentError

PromptName = Literal["auto", "chat", "brief", "passage"]
DEFAULT_SYSTEM_PROMPT = "Answer the question from the documents. If they do not hold the answer, say so."
BRIEF_SYSTEM_PROMPT = "Answer the question with a few words from the documents. If they lack the answer, say so."
# Some templates (Llama 3, gpt-oss) write today's date into the system turn. The prefix is part of every cache's
# fingerprint, so all caches would be stale the next day. The fixed date is the fallback of Llama's own template. It is
# a macro, because Transformers does not pass functions through. The empty string preserves a following line break.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ '2024-07-26' if '-' in format else '26 Jul 2024' }}{% endmacro %}{{ '' }}"
)
_DOCUMENT, _SYSTEM, _ANSWER = "\ue000document\ue000", "\ue000system\ue000", "\ue000answer\ue000"
_NOT_IN_DIGEST = {"name", "switches", "stop", "system_prompt", "answer_before", "answer_after"}


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """Layout of prefix, documents and question in a prompt.

    Attributes:
        name: `chat`, `brief`, `passage`, or a custom name.
        prefix: Text before everything else, never compressed: system prompt, template head, worked examples.
        question_after: Text between the question and the answer.
        system_prompt: Instructions in the prefix; not repeated if a conversation's turns contain the same ones.
        answer_before: Text before an earlier answer in a conversation of several turns.
        answer_after: Text between an earlier answer and the next question's wrapper.
        stop: Strings that end an answer in this form, once it has a visible character.
        add_bos: True if the tokenizer's own start token precedes the prefix (chat templates contain theirs).
        switches: Names and values of the chat template's own variables, for conversations without documents too.
    """

    name: str
    prefix: str
    document_before: str
    document_after: str
    question_before: str
    question_after: str
    system_prompt: str = ""
    answer_before: str = ""
    answer_after: str = "\n"
    stop: tuple[str, ...] = ()
    add_bos: bool = True
    switches: tuple[tuple[str, Any], ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over the fields that determine the model's input for one question.

        Fields for earlier turns are not among them: turns follow the documents, and so cannot affect a cache.
        """
        fields = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_DIGEST}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def document(self, text: str) -> str:
        """The text of a document in its wrapper."""
        return f"{self.document_before}{text}{self.document_after}"

    def question(self, text: str) -> str:
        """A question in its wrapper."""
        return f"{self.question_before}{text.strip()}{self.question_after}"


# Two worked examples with which even a 135M model answers in a few words. Their subjects are chosen so that they cannot
# answer a user's question by accident.
PASSAGE = PromptForm(
    name="passage",
    prefix=(
        "Answer each question with a few words from the passage above it.\n\n"
        "Passage: The lighthouse of Orvik was built in 1874 by the engineer Maren Dahl. Its lamp burned whale oil "
        "until 1921, when the harbour office replaced it with an electric light.\n"
        "Question: Who built the lighthouse of Orvik?\n"
        "Answer: Maren Dahl\n\n"
        "Passage: Set the option retries to 0 to turn repeated requests off. The default is 3, and each attempt waits "
        "twice as long as the one before it.\n"
        "Question: How many times is a request repeated by default?\n"
        "Answer: 3\n\n"
    ),
    document_before="Passage: ",
    document_after="\n",
    question_before="Question: ",
    question_after="\nAnswer:",
    answer_before=" ",
    stop=("\n",),
)


# Switches of templates whose models think before they answer, off: an answer of 128 tokens would be all thinking.
_SWITCHES: Mapping[str, Any] = {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}


def choose_form(
    prompt: PromptName | PromptForm, tokenizer: Any, switches: Mapping[str, Any] | None = None
) -> PromptForm:
    """Resolve a prompt form: `auto` is the model's chat template, or `passage` if it has none.

    `brief` is the chat template with a system prompt that asks for a few words instead of sentences. A `PromptForm` is
    returned unchanged. `switches` are variables of the chat template. Errors as in `chat_form`.
    """
    if isinstance(prompt, PromptForm):
        return prompt
    if prompt == "passage" or (prompt == "auto" and not getattr(tokenizer, "chat_template", None)):
        return PASSAGE
    if prompt == "brief":
        form = chat_form(tokenizer, system_prompt=BRIEF_SYSTEM_PROMPT, switches=switches)
        return replace(form, name="brief")
    return chat_form(tokenizer, switches=switches)


def chat_form(
    tokenizer: Any, *, system_prompt: str = DEFAULT_SYSTEM_PROMPT, switches: Mapping[str, Any] | None = None
) -> PromptForm:
    """The prompt form of a model's own chat template, with system prompt and template head as the shared prefix.

    The system prompt is put before the documents if the template has no system turn. `switches` are variables of the
    template, e.g. `{"enable_thinking": True}`; those for thinking are off otherwise.

    Raises:
        ConfigError: The template is missing, cannot be rendered, or loses the text it is given.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this model's tokenizer has no chat template", where="prompt", next_step='Use prompt="passage".'
        )
    try:
        roles = (("system", _SYSTEM), ("user", _DOCUMENT))
        text = render_chat(tokenizer, [{"role": role, "content": content} for role, content in roles], switches)
    except ConfigError:
        text = ""
    if _SYSTEM not in text:  # a template that refuses (Gemma) or drops the system turn
        text = render_chat(tokenizer, [{"role": "user", "content": f"{_SYSTEM}\n\n{_DOCUMENT}"}], switches)
    head, found, tail = text.partition(_DOCUMENT)
    if not found or _SYSTEM not in head:
        raise ConfigError(
            "the chat template drops the text it is given", where="prompt", next_step='Use prompt="passage".'
        )
    return PromptForm(
        name="chat",
        prefix=head.replace(_SYSTEM, system_prompt),
        document_before="",
        document_after="\n\n",
        question_before="",
        question_after=tail,
        system_prompt=system_prompt,
        answer_after=_between_turns(tokenizer, switches),
        add_bos=False,
        switches=tuple((switches or {}).items()),
    )


def _between_turns(tokenizer: Any, switches: Mapping[str, Any] | None) -> str:
    """Text that a chat template puts between an answer and the next question."""
    turns = [("user", _DOCUMENT), ("assistant", _ANSWER), ("user", _SYSTEM)]
    try:
        text = render_chat(tokenizer, [{"role": role, "content": content} for role, content in turns], switches)
    except ConfigError:
        return "\n\n"  # a template for a single question
    after = text.partition(_ANSWER)[2]
    return after.partition(_SYSTEM)[0] if _SYSTEM in after else "\n\n"


def render_chat(tokenizer: Any, messages: list[dict[str, str]], switches: Mapping[str, Any] | None = None) -> str:
    """Render a conversation with the tokenizer's chat template, up to the beginning of the reply.

    `switches` are further variables of the template.

    Raises:
        ConfigError: The template rejects the conversation, e.g. for an unknown role.
    """
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _FIXED_DATE + template
        options = {**_SWITCHES, **(switches or {})}
        options |= {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        return str(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # templates raise any type (Gemma: TemplateError)
        raise ConfigError(
            f"the chat template cannot be rendered: {error}",
            where="prompt",
            next_step='Use prompt="passage", or only user and assistant turns.',
        ) from error


class PromptEncoder:
    """A tokenizer and a prompt form; the basis of `Backbone`. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, prompt: PromptForm) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self._tokenizer_lock = threading.Lock()

    @cached_property
    def tokenizer_sha256(self) -> str:
        """SHA-256 over everything that determines the token ids of a text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            data = json.loads(backend.to_str())
            # Padding and truncation belong to the last call, not to the tokenizer.
            data.pop("padding", None), data.pop("truncation", None)
            text = json.dumps(data, sort_keys=True)
        else:
            text = json.dumps(
                [sorted(self.tokenizer.get_vocab().items()), sorted(map(str, self.tokenizer.all_special_tokens))]
            )
        return hashlib.sha256(text.encode()).hexdigest()

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
