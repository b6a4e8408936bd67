r"""The questions of `kv-memory demo` with the descriptions that answer them, as a file for `kv-memory eval qa`.

    python benchmarks/packages.py > packages.jsonl
    kv-memory eval qa packages.jsonl --model qwen-0.5b --set min_tokens=1 --method full --method none \
        --method reconstruction --method matched --keep-ratio 1/4 --keep-ratio 1/8 --keep-ratio 1/16

`contains` is then the share of right answers, as the demo counts them. Descriptions are of the releases installed here;
another release may have another description, and questions that it does not answer are left out.
"""

from __future__ import annotations

import json

from kv_memory.cli.demo_questions import known_questions
from kv_memory.cli.packages import PACKAGES, package_documents


def main() -> None:
    """One line a question."""
    documents = package_documents(PACKAGES)
    texts = {document.id.lower(): document.text for document in documents}
    for asked in known_questions(documents):
        line = {"context": texts[asked.package.lower()], "question": asked.text, "answer": list(asked.accepted)}
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
