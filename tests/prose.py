"""Plain English: phrases that comments, docstrings, messages and help texts of the package must not contain.

    python -m tests.prose    # lists them, for `make check`

A line that needs one of them says so in a comment on the same line: `# prose: ok`.
"""

from __future__ import annotations

import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BANNED = {
    r"^\s+\w+: (?:Of|What|How|Where|Whose|Which|Who|When|That) ": "begin the line of an argument with a noun",
    r"\bgo(?:es|ne|ing)? on with\b": "resume, continue",
    r"\banew\b": "again",
    r"\bwhoever\b": "anyone, the caller",
    r"\bfor ever\b": "forever, without end",
    r"\bthat which\b": "what, the",
    r"\bfor want of\b": "without",
    r"\b(?:is|are) none\b": "is not a, there is no",
    r"\bso many\b": "as many, this number of",
    r"\bby now\b": "",
    r"\bin hand\b": "in progress",
    r"\b(?:was|were|is|are) told\b": "reported",
    r"\bcomes? to be\b": "becomes",
}
_RULES = [(re.compile(pattern, re.MULTILINE), advice) for pattern, advice in BANNED.items()]


def pieces(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Comments and strings of a file, each with its first line and whether that is allowed everything."""
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    allowed = {token.start[0] for token in tokens if token.type == tokenize.COMMENT and "prose: ok" in token.string}
    for token in tokens:
        if token.type in {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}:
            yield token.start[0], token.string, token.end[0] in allowed


def problems(path: Path) -> Iterator[str]:
    """What is to be said otherwise in a file, one line each."""
    for line, text, is_allowed in pieces(path):
        for rule, advice in () if is_allowed else _RULES:
            for match in rule.finditer(text):
                at = line + text.count("\n", 0, match.start() + len(match[0]) - len(match[0].lstrip()))
                hint = f" ({advice})" if advice else ""
                yield f"{path.relative_to(ROOT)}:{at}: {match[0].strip()!r}{hint}"


def main() -> int:
    """List all problems; 1 if there are any."""
    found = [
        problem
        for folder in ("kv_memory", "integrations")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for problem in problems(path)
    ]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
