"""LangChain's own standard suites. They run on a tiny random model, which samples text of any bytes.

What they skip, and why; the last test holds the list:

- Nothing is read from the environment, the model is that of an open store: test_init_from_env
- What has a store behind it cannot be serialised: test_serdes
- One store, one model: test_invoke_with_model_override, test_ainvoke_with_model_override,
  test_stream_with_model_override, test_astream_with_model_override
- The model cannot call tools: test_tool_calling, test_tool_calling_async, test_tool_calling_with_no_arguments,
  test_tool_choice, test_bind_runnables_as_tools, test_tool_message_histories_string_content,
  test_tool_message_histories_list_content, test_tool_message_error_status, test_structured_few_shot_examples,
  test_agent_loop, test_unicode_tool_call_integration
- It reads text only: test_image_inputs, test_audio_inputs, test_pdf_inputs, test_image_tool_message,
  test_pdf_tool_message
- Tool calls and thinking are among the messages: test_anthropic_inputs
- Times calls that were recorded from a network, of which there is none: test_stream_time
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.indexing.base import DocumentIndex
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.integration_tests.indexer import AsyncDocumentIndexTestSuite, DocumentIndexerTestSuite
from langchain_tests.unit_tests import ChatModelUnitTests

from kv_memory import KVMemory
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryIndex, KVMemoryRetriever
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import PromptForm
from tests.conftest import SHORT_FORM, make_model, make_tokenizer
from tests.memories import open_memory


def quoting_backbone() -> Any:
    """A tiny random model that likes quotation marks and dislikes to end, so that its JSON comes to an end in time."""
    model, tokenizer = make_model("llama", max_position_embeddings=4096), make_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 20.0  # the same for all tokens, so that it works as a bias
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids('"'), 0] = 5.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -5.0
    return Backbone(model, tokenizer, prompt=PromptForm(**SHORT_FORM), name="quoting")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVMemory]:
    with open_memory(tmp_path_factory.mktemp("suites") / "store", quoting_backbone()) as memory:
        memory.add([(f"note {i}", f"Note {i} tells of a walrus and nothing else.") for i in range(5)])
        yield memory


class _Chat:
    """What both suites of chat models are told."""

    @pytest.fixture(autouse=True)
    def _memory(self, opened: KVMemory) -> None:
        self.memory = opened

    @property
    def chat_model_class(self) -> type[ChatKVMemory]:
        return ChatKVMemory

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"memory": self.memory, "api_key": "none"}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 1.0, "seed": 0, "max_tokens": 200, "timeout": 60, "stop": [], "max_retries": 2}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_tool_choice(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False


class TestChatModelUnit(_Chat, ChatModelUnitTests):
    pass


class TestChatModelIntegration(_Chat, ChatModelIntegrationTests):
    pass


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _memory(self, opened: KVMemory) -> None:
        self.memory = opened

    @property
    def retriever_constructor(self) -> type[KVMemoryRetriever]:
        return KVMemoryRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"memory": self.memory}

    @property
    def retriever_query_example(self) -> str:
        return "walrus"


class TestWrappedRetriever(TestRetriever):
    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"memory": self.memory, "retriever": KVMemoryIndex(self.memory, k=5)}


@pytest.fixture
def empty(tmp_path: Path, wide: Any) -> Iterator[KVMemory]:
    with open_memory(tmp_path / "store", wide) as memory:
        yield memory


class TestIndex(DocumentIndexerTestSuite):
    @pytest.fixture
    def index(self, empty: KVMemory) -> Iterator[DocumentIndex]:
        yield KVMemoryIndex(empty)


class TestIndexAsync(AsyncDocumentIndexTestSuite):
    @pytest.fixture
    async def index(self, empty: KVMemory) -> KVMemoryIndex:  # type: ignore[override]
        return KVMemoryIndex(empty)


def test_the_docstring_lists_the_skipped_tests(ran: dict[str, bool]) -> None:
    named = set(re.findall(r"\btest_\w+", __doc__ or ""))
    assert named <= {*dir(TestChatModelUnit), *dir(TestChatModelIntegration)}
    assert {name for name, skipped in ran.items() if skipped} == named & ran.keys()
