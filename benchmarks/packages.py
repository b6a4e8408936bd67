r"""Questions with known answers about descriptions of packages, the first the demo's, for `kv-memory eval qa`.

    python benchmarks/packages.py > packages.jsonl
    kv-memory eval qa packages.jsonl --model qwen-0.5b --set min_tokens=1 --method full --method none \
        --method reconstruction --method matched --keep-ratio 1/4 --keep-ratio 1/8 --keep-ratio 1/16

`contains` is then the share of right answers, as the demo counts them. Descriptions are of the releases installed here;
another release may have another description, and questions that it does not answer are left out.
"""

from __future__ import annotations

import json

from kv_memory.cli.demo_documents import QUESTIONS, Question, known_questions, package_documents

MORE = (
    Question("Who is the author of diskcache?", ("Grant Jenks",), "diskcache"),
    Question("Which web framework is diskcache compatible with?", ("Django",), "diskcache"),
    Question("What does Mako's syntax compile into?", ("Python modules", "Python module"), "Mako"),
    Question("Name a templating language that Mako borrows from.", ("Django", "Cheetah", "Myghty", "Genshi"), "Mako"),
    Question("What is the licence of networkx?", ("BSD", "BSD-3-Clause"), "networkx"),
    Question("Who is the author of numpy?", ("Oliphant",), "numpy"),
    Question("What does PEFT stand for?", ("Parameter-Efficient Fine-Tuning",), "peft"),
    Question("With which library is PEFT integrated for managing different adapters?", ("Diffusers",), "peft"),
    Question("Between which operating systems does platformdirs handle the differences?", ("macOS",), "platformdirs"),
    Question("What is the licence of platformdirs?", ("MIT",), "platformdirs"),
    Question("Which CLI application uses pypdf to interact with PDFs?", ("pdfly",), "pypdf"),
    Question("Where should questions about pypdf be asked?", ("StackOverflow", "Stack Overflow"), "pypdf"),
    Question("Which lock does the regex module release?", ("GIL", "Global Interpreter Lock"), "regex"),
    Question("Which Unicode encoding does PyPy store strings as?", ("UTF-8",), "regex"),
    Question("Who is the author of rich?", ("Will McGugan",), "rich"),
    Question("Which version of Python does Rich require?", ("3.8", "3.8.0"), "rich"),
    Question("On which site is a video introduction to Rich?", ("calmcode", "calmcode.io"), "rich"),
    Question("What kind of patterns does SQLAlchemy provide?", ("persistence",), "SQLAlchemy"),
    Question("From which language does the name tqdm derive?", ("Arabic",), "tqdm"),
    Question("What is the shortcut for tqdm(range(N))?", ("trange", "trange(N)"), "tqdm"),
    Question("How large is the overhead of ProgressBar per iteration?", ("800ns/iter", "800ns", "800 ns"), "tqdm"),
    Question("What is Typer based on?", ("type hints",), "typer"),
)
PACKAGES = tuple(dict.fromkeys(question.package for question in QUESTIONS + MORE))


def main() -> None:
    """One line a question."""
    documents = package_documents(PACKAGES)
    texts = {document.id: document.text for document in documents}
    for asked in known_questions(documents, QUESTIONS + MORE):
        line = {"context": texts[asked.package], "question": asked.text, "answer": list(asked.accepted)}
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
