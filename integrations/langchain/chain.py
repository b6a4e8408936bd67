"""create_kv_chain: LangChain's "stuff documents" chain, with distilled caches in the place of the stuffed text."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnablePassthrough, RunnableSequence
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import RunnableConfigurableFields

from kv_memory import ConfigError, Reference
from kv_memory.query import key_of

from .chat_model import ChatKVMemory
from .documents import KV_ID
from .messages import options_for

__all__ = ["DOCUMENTS_ABOVE", "create_kv_chain", "create_kv_retrieval_chain"]

DOCUMENTS_ABOVE = "(see the documents above)"  # in the place of {context}
_PROMPT = ChatPromptTemplate.from_messages(
    [MessagesPlaceholder("chat_history", optional=True), ("human", "{input}")]  # nothing else: documents stand above
)
_log = logging.getLogger(__name__)


def create_kv_chain(
    llm: Runnable[Any, Any],
    prompt: BasePromptTemplate[Any] | None = None,
    *,
    output_parser: BaseOutputParser[Any] | None = None,
    document_variable_name: str = "context",
) -> Runnable[dict[str, Any], Any]:
    """A chain that answers from the distilled caches of documents: `{"context": [documents], "input": text}` to `str`.

    It is shaped like LangChain's `create_stuff_documents_chain`, and goes wherever that does. Tokens stream through it,
    and the model runs in a thread where it is called asynchronously. Documents with a `kv_id` are read from their
    cache; those without, and those whose text has changed since, are read as text, this once; those with neither are
    left out and logged.

    Args:
        llm: A `ChatKVMemory`, with or without `bind`, `with_config`, `with_retry` or `with_structured_output`.
        prompt: What stands behind the documents, with any variables. `{context}`, if it is there, becomes a remark
            that they stand above; a message of nothing else is dropped. Without one, `{input}` alone, behind a
            `chat_history` of messages if that is given.
        output_parser: Of the answer; its text if None. LangChain's own read a stream that is closed to its end.
        document_variable_name: What the documents are called in the chain's input.

    Raises:
        ConfigError: The LLM is none of ours: another would be asked without any document, and nobody would notice.

    Example:
        ```python
        chain = create_kv_chain(ChatKVMemory(memory))
        chain.invoke({"context": KVMemoryRetriever(memory).invoke(question), "input": question})
        ```
    """
    is_plain = _check_llm(llm)
    parser = output_parser or (_Text() if is_plain else None)
    asked = prompt or _PROMPT

    def answer(values: Mapping[str, Any]) -> Runnable[Any, Any]:
        # Returned, not run: what a lambda returns is run with all it streams, what it runs itself is run to its end.
        options = options_for(_references(values, document_variable_name))
        seen = {**values, document_variable_name: DOCUMENTS_ABOVE}
        shown = RunnableLambda[Any, Any](lambda _: seen, name="documents_above")
        chain: Runnable[Any, Any] = shown | asked | RunnableLambda(_without_remark) | llm.bind(**options)
        return chain if parser is None else chain | parser

    return RunnableLambda(answer, name="kv_chain").with_config(run_name="kv_chain")


def create_kv_retrieval_chain(
    retriever: BaseRetriever,
    llm: Runnable[Any, Any],
    prompt: BasePromptTemplate[Any] | None = None,
) -> Runnable[dict[str, Any], dict[str, Any]]:
    """A retriever and `create_kv_chain`: `{"input": text}` to `{"input", "context", "answer"}`.

    What comes out is what LangChain's `create_retrieval_chain` gives.

    Args:
        retriever: A `KVMemoryRetriever` or `KVMemoryIndex`; what others find is read as text.
        llm: See `create_kv_chain`.
        prompt: See `create_kv_chain`.

    Raises:
        ConfigError: The LLM is none of ours.
    """
    find = (itemgetter("input") | retriever).with_config(run_name="retrieve_documents")
    return RunnablePassthrough.assign(context=find).assign(answer=create_kv_chain(llm, prompt))


class _Text(StrOutputParser):
    """The text of messages, as they stream.

    When the stream of LangChain's own parser is closed, it reads its input to the end, for tracing: the model would
    decode an answer that nobody waits for.
    """

    def transform(
        self, input: Iterator[str | BaseMessage], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[str]:
        for message in input:
            yield message.text if isinstance(message, BaseMessage) else message

    async def atransform(
        self, input: AsyncIterator[str | BaseMessage], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[str]:
        async for message in input:
            yield message.text if isinstance(message, BaseMessage) else message


def _without_remark(prompt: PromptValue) -> PromptValue:
    """A message that held nothing but the documents says nothing now."""
    if not isinstance(prompt, ChatPromptValue):
        return prompt
    return ChatPromptValue(messages=[message for message in prompt.messages if message.content != DOCUMENTS_ABOVE])


def _check_llm(llm: Runnable[Any, Any]) -> bool:
    """Whether it answers with messages; raises unless it is one of ours."""
    inner: Any = llm
    is_plain = True
    while not isinstance(inner, ChatKVMemory):
        if isinstance(inner, RunnableBindingBase):
            inner = inner.bound
        elif isinstance(inner, RunnableConfigurableFields):
            inner = inner.default
        elif isinstance(inner, RunnableSequence):  # with_structured_output; a binding reaches its first step
            inner, is_plain = inner.first, False
        else:
            raise ConfigError(
                f"{type(inner).__name__} cannot answer from distilled caches",
                where="llm of create_kv_chain",
                next_step="Pass ChatKVMemory(memory), or use LangChain's create_stuff_documents_chain with this LLM.",
            )
    return is_plain


def _references(values: Mapping[str, Any], name: str) -> list[Reference]:
    documents = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(documents, Sequence) or not all(isinstance(document, Document) for document in documents):
        raise ConfigError(
            f"the chain's input has no list of documents under {name!r}",
            where="input of create_kv_chain",
            next_step=f'Invoke it with {{"{name}": retriever.invoke(question), "input": question}}.',
        )
    references: list[Reference] = []
    for document in documents:
        text = document.page_content
        mark = Reference.parse(document.metadata[KV_ID]) if document.metadata.get(KV_ID) else None
        if mark is not None and (not text or mark.key == key_of(text)):
            references.append(mark)
        elif text.strip():  # never distilled, or changed since by something between the retriever and here
            references.append(Reference(key=key_of(text), text=text))
        else:
            _log.warning("a document without text is left out of the context: %s", document.id)
    return references
