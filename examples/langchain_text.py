"""Ask a folder of Markdown pages about what is in them, with LangChain."""

import sys

from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_text_splitters import RecursiveCharacterTextSplitter

from parts import DocumentRetriever, LocalChatModel, create_stuff_documents_chain, read_pages

folder, *questions = sys.argv[1:]
llm = LocalChatModel()
splitter = RecursiveCharacterTextSplitter(chunk_size=800, chunk_overlap=0)
documents = splitter.create_documents(read_pages(folder).values())
retriever = DocumentRetriever(documents=documents)
prompt = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{input}")])
answer = create_stuff_documents_chain(llm, prompt)
chain = {"context": retriever, "input": RunnablePassthrough()} | answer
for question in questions:
    print(question, end=" -> ")
    for piece in chain.stream(question):
        print(piece, end="", flush=True)
    print()
