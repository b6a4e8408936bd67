"""`kv-memory advise`: recommends a keep_ratio for the user's own documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_memory.cli.options import Changes, EncodingOption, command
from kv_memory.cli.output import Output, plain, size_text
from kv_memory.cli.progress import track_eval
from kv_memory.config import ratio_of
from kv_memory.settings import MemorySettings

if TYPE_CHECKING:
    from kv_memory.evaluate import Advice, AdviceRow

_SHOWN = 3


@command(
    *("model", "adapter", "selector", "passage_tokens", "prompt", "storage"),
    json_lines="one for each keep_ratio, then the recommendation",
)
def advise_on(
    paths: list[Path],
    *,
    keep_ratio: list[str] | None = None,
    max_kl: float = 0.1,
    min_same: float = 0.8,
    n_passages: int = 8,
    changes: Changes,
    encoding: EncodingOption = "utf-8",
    seed: int = 0,
    time_limit: float | None = None,
    out: Output,
) -> Any:
    """Measure on a sample of your documents how much can be dropped, and recommend a keep_ratio.

    Nothing is stored. The model writes questions about passages drawn from the documents, and answers them from the
    full cache and from compressed ones. KL is the divergence from the full cache on its own answers, in nats per token.
    same is the share of answers that stay the same; an empty answer never counts. prefills is the cost of compression,
    in plain prefills of the passage. The recommendation is the smallest measured keep_ratio with a KL of at most
    --max-kl and at least --min-same of the answers the same.

    Options:
        paths (FOLDER): Folders and files with your documents.
        keep_ratio (SHARE): 0.25 or 1/4; repeatable.  [default: 1/2, 1/4, 1/8, 1/16]
        max_kl (KL): Required: KL to the full cache at most this, in nats.
        min_same (SHARE): Required: at least this share of answers stays the same.
        n_passages (N): Passages to draw; up to 4 questions about each.
        seed (N): Seed of passages and questions.
        time_limit (SECONDS): Stop after this time, with the results so far.
    """
    out.stopped = "Nothing was stored. Run the same command again; with --time-limit, it stops with the results so far."
    settings = MemorySettings.resolve({}, **changes)
    ratios = [ratio_of(text) for text in keep_ratio or ()]
    # Checked before the model and its library are loaded, so that a typo fails at once.
    from kv_memory.documents import read_documents
    from kv_memory.documents.decoding import check_encoding

    check_encoding(encoding)
    for path in paths:
        if not path.exists():
            read_documents(path)
    with out.working("Starting"):
        from kv_memory.evaluate import DEFAULT_KEEP_RATIOS, Criteria, advise
        from kv_memory.model.backbone import Backbone

    criteria = Criteria(max_kl=max_kl, min_same=min_same)
    with out.working(f"Loading the model ({settings.model})"):
        backbone = Backbone.load(settings.model, prompt=settings.prompt)
    with track_eval(out) as tracker:
        advice = advise(
            paths,
            settings=settings,
            backbone=backbone,
            keep_ratios=ratios or DEFAULT_KEEP_RATIOS,
            criteria=criteria,
            n_passages=n_passages,
            seed=seed,
            encoding=encoding,
            time_limit_s=time_limit,
            on_progress=tracker,
        )
    _print(out, advice)
    rows = [{**plain(row), "factor": row.factor} for row in advice.rows]
    counts = {name: getattr(advice, name) for name in ("n_documents", "n_unanswered", "n_too_long", "complete")}
    found = advice.recommendation
    return [*rows, {"recommended": found.keep_ratio, **plain(found), **plain(criteria), **counts}]


def _print(out: Output, advice: Advice) -> None:
    for error in advice.errors[:_SHOWN]:
        out.note(f"Left out: {error.what} [{error.where}]", style="yellow")
    if len(advice.errors) > _SHOWN:
        out.note(f"Left out: {len(advice.errors) - _SHOWN} more.", style="yellow")
    if advice.n_too_long:
        out.note(f"{advice.n_too_long} passages were left out: with a question they exceed the model's window.")
    if advice.n_unanswered:
        out.note(f"{advice.n_unanswered} questions were left out: the full cache gives no answer to them.")
    if not advice.complete:
        out.note("Stopped by the time limit.")
    from kv_memory.evaluate.report import kept_text

    found, rows = advice.recommendation, advice.rows
    if rows:
        out.line(
            f"{rows[0].n_questions} questions about {rows[0].n_passages} passages of {advice.n_documents} documents, "
            f"{rows[0].method}; a passage's full cache takes {size_text(round(rows[0].full_bytes))}"
        )
        header = ["kept", "bytes/passage", "smaller", "KL", "same", "s/passage", "prefills"]
        out.table(header, [_cells(row) for row in rows], right=header[1:])
    out.line(f"Recommended: --keep-ratio {kept_text(found.keep_ratio)}: {found.reason}.")
    out.line(f"  {found.command}")


def _cells(row: AdviceRow) -> list[str]:
    from kv_memory.evaluate.report import kept_text

    interval = "" if row.kl_ci is None else f" [{row.kl_ci[0]:.3f}, {row.kl_ci[1]:.3f}]"
    return [
        kept_text(row.keep_ratio),
        size_text(round(row.size_bytes)),
        f"{row.factor:.1f}x",
        f"{row.kl:.3f}{interval}",
        f"{row.same:.0%}",
        f"{row.seconds:.1f}",
        f"{row.prefills:.1f}",
    ]
