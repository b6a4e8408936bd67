"""Prompt forms: the shared prefix, the wrapper around each document, the wrapper around the question.

A form is text only. Its three pieces are tokenised separately, so that no token spans a boundary. The prefix is
prefilled once and shared by all documents.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kv_memory.errors import ConfigError

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


_NOT_IN_DIGEST = {"name", "stop", "system_prompt", "answer_before", "answer_after"}


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """Layout of prefix, documents and question in a prompt.

    Attributes:
        name: `chat`, `brief`, `passage`, or a custom name.
        prefix: Text before everything else, never compressed: system prompt, template head, worked examples.
        document_before: Text before each document.
        document_after: Text after each document.
        question_before: Text before the question.
        question_after: Text between the question and the answer.
        system_prompt: Instructions in the prefix; not repeated if a conversation's turns contain the same ones.
        answer_before: Text before an earlier answer in a conversation of several turns.
        answer_after: Text between an earlier answer and the next question's wrapper.
        stop: Strings that end an answer in this form, once it has a visible character.
        add_bos: True if the tokenizer's own start token precedes the prefix (chat templates contain theirs).
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


def choose_form(prompt: PromptName | PromptForm, tokenizer: Any) -> PromptForm:
    """Resolve a prompt form: `auto` is the model's chat template, or `passage` if it has none.

    `brief` is the chat template with a system prompt that asks for a few words instead of sentences. A `PromptForm` is
    returned unchanged.

    Raises:
        ConfigError: See `chat_form`.
    """
    if isinstance(prompt, PromptForm):
        return prompt
    if prompt == "passage" or (prompt == "auto" and not getattr(tokenizer, "chat_template", None)):
        return PASSAGE
    if prompt == "brief":
        return replace(chat_form(tokenizer, system_prompt=BRIEF_SYSTEM_PROMPT), name="brief")
    return chat_form(tokenizer)


def chat_form(tokenizer: Any, *, system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> PromptForm:
    """The prompt form of a model's own chat template, with system prompt and template head as the shared prefix.

    Args:
        tokenizer: Transformers tokenizer with a chat template.
        system_prompt: Text of the system turn; put before the documents if the template has no such turn.

    Raises:
        ConfigError: The template is missing, cannot be rendered, or loses the text it is given.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this model's tokenizer has no chat template", where="prompt", next_step='Use prompt="passage".'
        )
    user = {"role": "user", "content": _DOCUMENT}
    try:
        text = _render(tokenizer, [{"role": "system", "content": _SYSTEM}, user])
        if _SYSTEM not in text:
            raise ValueError("the template drops the system turn")
    except Exception:  # templates raise any type for an unknown role (Gemma: TemplateError)
        try:
            text = _render(tokenizer, [{"role": "user", "content": f"{_SYSTEM}\n\n{_DOCUMENT}"}])
        except Exception as error:
            raise ConfigError(
                f"the chat template cannot be rendered: {error}", where="prompt", next_step='Use prompt="passage".'
            ) from error
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
        answer_after=_between_turns(tokenizer),
        add_bos=False,
    )


def _between_turns(tokenizer: Any) -> str:
    """Text that a chat template puts between an answer and the next question."""
    turns = [("user", _DOCUMENT), ("assistant", _ANSWER), ("user", _SYSTEM)]
    try:
        text = _render(tokenizer, [{"role": role, "content": content} for role, content in turns])
    except Exception:
        return "\n\n"  # a template for a single question
    after = text.partition(_ANSWER)[2]
    return after.partition(_SYSTEM)[0] if _SYSTEM in after else "\n\n"


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Render a conversation with the tokenizer's chat template, up to the beginning of the reply.

    Raises:
        ConfigError: The template rejects the conversation, e.g. for an unknown role. Templates raise any type.
    """
    try:
        return _render(tokenizer, messages)
    except Exception as error:
        raise ConfigError(
            f"the chat template cannot render this conversation: {error}",
            where="prompt",
            next_step='Use prompt="passage", or only user and assistant turns.',
        ) from error


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    return str(text)
