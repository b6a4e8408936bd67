"""Ask a folder of Markdown pages about what is in them, with LangChain."""

import sys

from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryRetriever, create_kv_chain
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_text_splitters import RecursiveCharacterTextSplitter

from parts import DocumentRetriever, read_pages

folder, *questions = sys.argv[1:]
llm = ChatKVMemory.open("kv-store", max_tokens=32)
splitter = RecursiveCharacterTextSplitter(chunk_size=800, chunk_overlap=0)
documents = splitter.create_documents(read_pages(folder).values())
retriever = KVMemoryRetriever(llm.memory, retriever=DocumentRetriever(documents=documents), on_missing="compress")
prompt = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{input}")])
answer = create_kv_chain(llm, prompt)
chain = {"context": retriever, "input": RunnablePassthrough()} | answer
for question in questions:
    print(question, end=" -> ")
    for piece in chain.stream(question):
        print(piece, end="", flush=True)
    print()
