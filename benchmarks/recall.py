"""How often a chat remembers: facts stated long ago, recalled from distilled turns at several keep ratios.

    python benchmarks/recall.py            # a table
    python benchmarks/recall.py --json     # one JSON object per keep ratio

A conversation of 200 turns, in which every fifth exchange states a fact ("My dog is called Biscuit.") and the others
are small talk. All turns have left the prompt; each fact is asked for once, and recalled by BM25 from the caches.
Reported are the share of answers that contain the fact, how often the right passage was recalled at all, and the tokens
prefilled for a question. The ceiling is keep ratio 1; the floor, the same questions without recall.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from kv_memory import Conversation, DecodeSettings, KVMemory, Turn
from kv_memory.config import ratio_of

FACTS = [  # said, asked, a word of the answer
    ("My dog is called Biscuit.", "What is my dog called?", "Biscuit"),
    ("My sister lives in Porto.", "Where does my sister live?", "Porto"),
    ("My boat is painted green.", "Which colour is my boat painted?", "green"),
    ("My doctor is Helena Vance.", "Who is my doctor?", "Vance"),
    ("My train to work leaves at 7.40.", "When does my train to work leave?", "7.40"),
    ("My grandfather was a clockmaker.", "What was my grandfather?", "clockmaker"),
    ("My locker has the number 318.", "Which number does my locker have?", "318"),
    ("My favourite soup is lentil soup.", "What is my favourite soup?", "lentil"),
    ("My bicycle was stolen in Ghent.", "Where was my bicycle stolen?", "Ghent"),
    ("My daughter plays the cello.", "What does my daughter play?", "cello"),
    ("My landlord is Oskar Lind.", "Who is my landlord?", "Lind"),
    ("My garden has three plum trees.", "Which trees does my garden have?", "plum"),
    ("My first car was a Volvo.", "What was my first car?", "Volvo"),
    ("My piano came from Leipzig.", "Where did my piano come from?", "Leipzig"),
    ("My neighbour keeps seven goats.", "What does my neighbour keep?", "goats"),
    ("My passport expires in March.", "When does my passport expire?", "March"),
    ("My uncle sells carpets.", "What does my uncle sell?", "carpets"),
    ("My cat sleeps on the oven.", "Where does my cat sleep?", "oven"),
    ("My teacher was called Ines Moreau.", "What was my teacher called?", "Moreau"),
    ("My umbrella is yellow.", "Which colour is my umbrella?", "yellow"),
]
SMALL_TALK = ["It rains again today", "I had coffee before", "The meeting was long", "Nothing is new here"]
SETTINGS = DecodeSettings(max_new_tokens=24)


def main() -> None:
    """Talk, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model, a folder or a hub id (default: smollm2)")
    parser.add_argument(
        "--keep-ratio", type=ratio_of, nargs="+", default=[1.0, 0.5, 0.25, 0.125], help="(default: 1 1/2 1/4 1/8)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="kv-memory-bench-") as folder,
        KVMemory.open(Path(folder) / "store", model=args.model) as memory,
    ):
        floor = [memory.reader.reply([Turn("user", asked)], settings=SETTINGS).reply.text for _, asked, _ in FACTS]
        for index, keep_ratio in enumerate(args.keep_ratio):
            row = measure(memory, keep_ratio) | {"found_without": share(floor)}
            print(json.dumps(row) if args.json else table_line(row, first=index == 0), flush=True)


def measure(memory: KVMemory, keep_ratio: float) -> dict[str, Any]:
    """One keep ratio: 100 exchanges, 20 questions."""
    old = Conversation(memory, f"at {keep_ratio}", keep_ratio=keep_ratio)
    for number, (said, _, _) in enumerate(FACTS):
        talk = [f"{line}, day {number}." for line in SMALL_TALK]
        for line in [said, *talk]:
            old.add([Turn("user", line), Turn("assistant", "I see.")])
    answers: list[str] = []
    n_recalled, n_prompt = 0, 0
    for said, asked, _ in FACTS:
        references = old.recall(asked)
        store = memory.store.in_collection(references[0].collection or "") if references else memory.store
        n_recalled += any(said in (store.text(reference.key) or "") for reference in references)
        reply = memory.reader.reply([Turn("user", asked)], references, settings=SETTINGS).reply
        answers.append(reply.text)
        n_prompt += reply.n_prompt_tokens
    return {
        "keep_ratio": keep_ratio,
        "n_turns": len(old.turns()),
        "n_facts": len(FACTS),
        "found": share(answers),
        "recalled": n_recalled / len(FACTS),
        "prompt_tokens": n_prompt / len(FACTS),
    }


def share(answers: list[str]) -> float:
    """Of answers that hold the word."""
    pairs = zip(answers, FACTS, strict=True)
    return sum(word.lower() in answer.lower() for answer, (_, _, word) in pairs) / len(FACTS)


def table_line(row: dict[str, Any], *, first: bool) -> str:
    """A row of a Markdown table; the first one brings the head."""
    line = (
        f"| {row['keep_ratio']:g} | {row['found']:.2f} | {row['recalled']:.2f} | {row['found_without']:.2f} "
        f"| {row['prompt_tokens']:.0f} |"
    )
    head = "| kept | facts found | passage recalled | without recall | tokens prefilled |\n" + "|---:" * 5 + "|\n"
    return head + line if first else line


if __name__ == "__main__":
    main()
