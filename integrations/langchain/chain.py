"""create_kv_chain: LangChain's "stuff documents" chain, with distilled caches instead of the stuffed text."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
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

from kv_memory import CacheNotFoundError, ConfigError, Reference
from kv_memory.query import Reader, key_of

from ..references import DOCUMENTS_ABOVE, KV_ID, is_blank, reference_options
from .chat_model import ChatKVMemory

_PROMPT = ChatPromptTemplate.from_messages(
    [MessagesPlaceholder("chat_history", optional=True), ("human", "{input}")]  # nothing else: documents come before
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

    It has the interface of LangChain's `create_stuff_documents_chain` and can replace it anywhere. Tokens stream
    through it. In asynchronous calls the model runs in a thread. A document with a `kv_id` is loaded from its cache. A
    document without one, or with a text that has changed since, is prefilled as text for this call. A document with
    neither cache nor text is left out and logged.

    Args:
        llm: A `ChatKVMemory`, with or without `bind`, `with_config`, `with_retry` or `with_structured_output`.
        prompt: The prompt that follows the documents, with any variables. `{context}`, if present, becomes a remark
            that the documents are above; a message that contains nothing else is dropped. The default is `{input}`
            alone, after the messages of `chat_history` if they are given.
        output_parser: Parser of the answer; the answer's text if None. LangChain's own parsers read their input to the
            end even when their stream is closed.
        document_variable_name: Name of the documents in the chain's input.

    Raises:
        ConfigError: The LLM is not a `ChatKVMemory`; another LLM would silently answer without any document.

    Example:
        ```python
        chain = create_kv_chain(ChatKVMemory(memory))
        chain.invoke({"context": KVMemoryRetriever(memory).invoke(question), "input": question})
        ```
    """
    model, is_plain = _model_in(llm)
    parser = output_parser or (_Text() if is_plain else None)
    asked = prompt or _PROMPT

    def answer(values: Mapping[str, Any]) -> Runnable[Any, Any]:
        # Returned, not run: LangChain streams a runnable that a lambda returns; one run inside would not stream.
        options = reference_options(_references(values, document_variable_name, model.memory.reader))
        seen = {**values, document_variable_name: DOCUMENTS_ABOVE}
        shown = RunnableLambda[Any, Any](lambda _: seen, name="documents_above")
        chain: Runnable[Any, Any] = shown | asked | RunnableLambda(_without_remark) | llm.bind(**options)
        return chain if parser is None else chain | parser

    return RunnableLambda(answer, name="kv_chain").with_config(run_name="kv_chain")


def create_kv_retrieval_chain(
    retriever: Runnable[Any, list[Document]], llm: Runnable[Any, Any], prompt: BasePromptTemplate[Any] | None = None
) -> Runnable[dict[str, Any], dict[str, Any]]:
    """A retriever and `create_kv_chain`: `{"input": text}` to `{"input", "context", "answer"}`.

    The output has the form of LangChain's `create_retrieval_chain`.

    Args:
        retriever: A `KVMemoryRetriever` or `KVMemoryIndex`, or any runnable that returns documents, e.g. one that
            looks at the chat history. Retrievers are given the input's text, other runnables the whole input. Documents
            without a cache are prefilled as text.
        llm: See `create_kv_chain`.
        prompt: See `create_kv_chain`.

    Raises:
        ConfigError: The LLM is not a `ChatKVMemory`.
    """
    find = itemgetter("input") | retriever if isinstance(retriever, BaseRetriever) else retriever
    found = RunnablePassthrough.assign(context=find.with_config(run_name="retrieve_documents"))
    # A document may be replaced between being found and being loaded: then both are done once more.
    return found.assign(answer=create_kv_chain(llm, prompt)).with_retry(
        retry_if_exception_type=(CacheNotFoundError,), wait_exponential_jitter=False, stop_after_attempt=2
    )


class _Text(StrOutputParser):
    """The text of messages as they stream.

    When the stream of LangChain's own parser is closed, the parser reads its input to the end for tracing, so the model
    would decode an answer that nobody waits for.
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
    """Drop messages that contain nothing but the remark in place of the documents."""
    if not isinstance(prompt, ChatPromptValue):
        return prompt
    return ChatPromptValue(messages=[message for message in prompt.messages if message.content != DOCUMENTS_ABOVE])


def _model_in(llm: Runnable[Any, Any]) -> tuple[ChatKVMemory, bool]:
    """The `ChatKVMemory` that `llm` wraps, and whether it answers with messages; a `ConfigError` without one."""
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
    return inner, is_plain


def _references(values: Mapping[str, Any], name: str, reader: Reader) -> list[Reference]:
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
            # The text helps only where the cache is gone, e.g. because the document was replaced since it was found.
            gone = not is_blank(text) and mark.collection is None and not reader.has_key(mark.key)
            references.append(replace(mark, text=text) if gone else mark)
        elif not is_blank(text):  # never compressed, or changed since by a step between the retriever and this chain
            references.append(Reference(key=key_of(text), text=text))
        else:
            _log.warning("a document without text is left out of the context: %s", document.id)
    return references
