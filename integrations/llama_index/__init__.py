"""kv-memory under LlamaIndex: answers from distilled caches through LlamaIndex's engines, indexes and memories.

```python
from llama_index.core import Document, VectorStoreIndex

from kv_memory import KVMemory
from kv_memory.integrations.llama_index import KVCompressTransform, KVMemoryLLM, KVMemoryQueryEngine

memory = KVMemory.open("my-store")
index = VectorStoreIndex.from_documents(documents, transformations=[splitter, KVCompressTransform(memory)])
engine = KVMemoryQueryEngine.from_defaults(index.as_retriever(similarity_top_k=1), llm=KVMemoryLLM(memory))
print(engine.query("How long are messages kept?"))
```

`KVMemoryLLM` is also an ordinary LLM. `KVMemoryRetriever`, `KVMemorySynthesizer` and `KVMemoryQueryEngine` answer from
caches. `KVMemoryStoreRetriever` finds the passages of `memory.add` without an index. `KVCompressTransform` and
`KVMemoryVectorStore` make caches and keep them in sync with an index. `KVMemoryChatEngine` and `KVMemoryBlock` are for
chats. All need the extra `llama-index`.
"""

from __future__ import annotations

from .engines import KVMemoryChatEngine, KVMemoryCondensePlusContextChatEngine, KVMemoryQueryEngine
from .indexing import KVCompressTransform, KVMemoryVectorStore
from .llm import KVMemoryLLM
from .memory_block import KVMemoryBlock
from .retriever import KVMemoryRetriever, KVMemoryStoreRetriever
from .synthesizer import KVMemorySynthesizer

__all__ = [
    "KVCompressTransform",
    "KVMemoryBlock",
    "KVMemoryChatEngine",
    "KVMemoryCondensePlusContextChatEngine",
    "KVMemoryLLM",
    "KVMemoryQueryEngine",
    "KVMemoryRetriever",
    "KVMemoryStoreRetriever",
    "KVMemorySynthesizer",
    "KVMemoryVectorStore",
]
