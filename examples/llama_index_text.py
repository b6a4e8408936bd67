"""Ask a folder of Markdown pages about what is in them, with LlamaIndex."""

import sys

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine

from parts import LocalLLM, NodeRetriever, load_documents

folder, *questions = sys.argv[1:]
llm = LocalLLM()
splitter = SentenceSplitter(chunk_size=200, chunk_overlap=0)
pipeline = IngestionPipeline(transformations=[splitter])
nodes = pipeline.run(documents=load_documents(folder))
engine = RetrieverQueryEngine.from_args(NodeRetriever(nodes), llm=llm, streaming=True)
for question in questions:
    print(question, end=" -> ")
    engine.query(question).print_response_stream()
    print()
