"""What an application takes from elsewhere: a model and a retriever. Here Transformers and BM25, all of it offline.

Nothing in this file knows of distilled caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import bm25s
import torch
from kv_memory.model.embedded import default_model  # a model folder like any other
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document as LangChainDocument
from langchain_core.language_models import SimpleChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from langchain_core.runnables import Runnable, RunnableLambda
from llama_index.core import Document
from llama_index.core.base.llms.types import CompletionResponse, CompletionResponseGen, LLMMetadata
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

MAX_TOKENS = 32


def read_pages(folder: str | Path) -> dict[str, str]:
    """The Markdown pages of a folder: path to text."""
    return {str(path): path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob("*.md"))}


def load_documents(folder: str | Path) -> list[Document]:
    """The pages as LlamaIndex documents."""
    return [Document(id_=path, text=text) for path, text in read_pages(folder).items()]


@cache
def _model() -> tuple[Any, Any]:
    folder = default_model().folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _answer(prompt: str) -> Iterator[str]:
    """A user's prompt in the model's chat template, answered piece by piece."""
    model, tokenizer = _model()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    options = {**inputs, "max_new_tokens": MAX_TOKENS, "do_sample": False, "streamer": streamer}
    Thread(target=model.generate, kwargs=options).start()
    yield from streamer


def _best(texts: Sequence[str], question: str, k: int) -> list[int]:
    """Places of the texts that share most with the question."""
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(list(texts), show_progress=False), show_progress=False)
    found, _ = retriever.retrieve(
        bm25s.tokenize(question, show_progress=False), k=min(k, len(texts)), show_progress=False
    )
    return [int(place) for place in found[0]]


class LocalLLM(CustomLLM):
    """A local model for LlamaIndex."""

    @property
    def metadata(self) -> LLMMetadata:
        """What the model can do."""
        return LLMMetadata(context_window=8192, num_output=MAX_TOKENS, model_name=default_model().title)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt."""
        return CompletionResponse(text="".join(_answer(prompt)))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt piece by piece."""
        text = ""
        for piece in _answer(prompt):
            text += piece
            yield CompletionResponse(text=text, delta=piece)


class NodeRetriever(BaseRetriever):
    """BM25 over LlamaIndex's nodes."""

    def __init__(self, nodes: Sequence[BaseNode], similarity_top_k: int = 1) -> None:
        self._nodes, self._k = list(nodes), similarity_top_k
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        places = _best([node.get_content() for node in self._nodes], query_bundle.query_str, self._k)
        return [NodeWithScore(node=self._nodes[place], score=1 / (1 + rank)) for rank, place in enumerate(places)]


class LocalChatModel(SimpleChatModel):
    """A local model for LangChain."""

    @property
    def _llm_type(self) -> str:
        return "local"

    def _call(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> str:
        return "".join(_answer(_text(messages)))

    def _stream(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        for piece in _answer(_text(messages)):
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))


def _text(messages: list[BaseMessage]) -> str:
    return "\n\n".join(str(message.content) for message in messages)


def create_stuff_documents_chain(llm: SimpleChatModel, prompt: ChatPromptTemplate) -> Runnable[Any, str]:
    """What langchain-classic has under this name: the documents' text goes into the prompt."""

    def stuff(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "context": "\n\n".join(document.page_content for document in values["context"])}

    return RunnableLambda(stuff) | prompt | llm | StrOutputParser()


class DocumentRetriever(LangChainRetriever):
    """BM25 over LangChain's documents."""

    documents: list[LangChainDocument]
    k: int = 1

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[LangChainDocument]:
        return [self.documents[place] for place in _best([d.page_content for d in self.documents], query, self.k)]
