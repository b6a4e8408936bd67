"""Ask a folder of Markdown pages about what is in them, with LlamaIndex."""

import sys

from kv_memory.integrations.llama_index import KVCompressTransform, KVMemoryLLM, KVMemoryQueryEngine
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter

from parts import NodeRetriever, load_documents

folder, *questions = sys.argv[1:]
llm = KVMemoryLLM.open("kv-store", max_tokens=32)
splitter = SentenceSplitter(chunk_size=200, chunk_overlap=0)
pipeline = IngestionPipeline(transformations=[splitter, KVCompressTransform(llm.memory)])
nodes = pipeline.run(documents=load_documents(folder))
engine = KVMemoryQueryEngine.from_defaults(NodeRetriever(nodes), llm=llm, streaming=True)
for question in questions:
    print(question, end=" -> ")
    engine.query(question).print_response_stream()
    print()
