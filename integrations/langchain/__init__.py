"""kv-memory under LangChain: answers from distilled caches through LangChain's chains, indexes and chats.

```python
from kv_memory import KVMemory
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryRetriever, create_kv_retrieval_chain

memory = KVMemory.open("my-store")
memory.add(["The ferry to Skarholm leaves at 7.40 from pier 4."])
chain = create_kv_retrieval_chain(KVMemoryRetriever(memory), ChatKVMemory(memory))
print(chain.invoke({"input": "When does the ferry to Skarholm leave?"})["answer"])
```

`ChatKVMemory` is also an ordinary chat model. `KVMemoryRetriever` finds documents with their caches, alone or around
another retriever, and `create_kv_chain` answers from them. `KVMemoryIndex` keeps caches in sync with a document source
through LangChain's `index`. `create_kv_history` keeps the prompts of long chats short, e.g. in a graph of LangGraph
with a checkpointer. All need the extra `langchain`.
"""

from __future__ import annotations

from .chain import create_kv_chain, create_kv_retrieval_chain
from .chat_model import ChatKVMemory
from .history import create_kv_history
from .retriever import KVMemoryIndex, KVMemoryRetriever

__all__ = [
    "ChatKVMemory",
    "KVMemoryIndex",
    "KVMemoryRetriever",
    "create_kv_chain",
    "create_kv_history",
    "create_kv_retrieval_chain",
]
