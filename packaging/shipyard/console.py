"""What a person sees: progress with rate and time left, and the table at the end of a release."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from models.release import Release, Score

SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Report on standard error: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0
        self._label = ""
        self._began = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Show a stage while it works."""
        start = self._said = time.monotonic()
        self._label = ""
        if self.console.is_terminal:
            columns = (
                TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.console, transient=True) as self._bar:
                self._task = self._bar.add_task(title, total=None)
                yield
            self._bar = None
        else:
            yield
        self.line(f"done     {title} in {time.monotonic() - start:.1f} s")

    def progress(self, what: str, done: int, total: int) -> None:
        """Take note of progress within a stage."""
        now = time.monotonic()
        label = what.split(",")[0]
        if label != self._label:
            self._label, self._began = label, now
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total)
        elif now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            rate = done / max(now - self._began, 1e-9)
            left = (
                f", {rate:.1f} a second, {(total - done) / rate:.0f} s left" if rate > 0 and now > self._began else ""
            )
            self.line(f"         {what}: {done} of {total}{left}")

    def line(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)


COLUMNS = ("sub-model", "target", "metric", "baseline", "before", "after [95 %]", "over baseline [95 %]",
           "form: size, same top-10 places (logits' error), metric lost, latency")  # fmt: skip


def release_lines(release: Release) -> list[tuple[str, ...]]:
    """Return a line a sub-model for `COLUMNS`; a cell may have several lines."""
    lines: list[tuple[str, ...]] = []
    for name, sub in release.submodels.items():
        score, after, over = sub.score, sub.score.after, sub.score.over_baseline
        forms = [
            f"{f.precision}: {f.bytes / 1e6:.1f} MB, {f.order:.1%} ({f.parity:.0e}), {f.loss:+.2%}, {f.latency_ms:.1f} ms"
            for f in sub.formats
        ]
        lines.append(
            (
                name,
                sub.target,
                f"{score.metric}\non {score.examples}",
                f"{score.baseline.value:.3f}\n{score.baseline_name}",
                f"{score.before.value:.3f}",
                f"{after.value:.3f}\n[{after.low:.3f}, {after.high:.3f}]",
                f"{over.value:+.3f}{_part(score)}\n[{over.low:+.3f}, {over.high:+.3f}]",
                "\n".join(forms),
            )
        )
    return lines


def _part(score: Score) -> str:
    """Return a difference as a part of the baseline, where there is one."""
    return "" if score.relative is None else f" ({score.relative.value:+.1%})"


def fusion_line(release: Release) -> str:
    """Return what the fusion of a release gains; an empty text where there is none."""
    fusion = release.fusion
    if fusion is None:
        return ""
    over = fusion.over_best_single
    return (
        f"fusion of {', '.join(fusion.sources)} by {fusion.method}: ndcg@10 {fusion.fused.value:.3f} "
        f"[{fusion.fused.low:.3f}, {fusion.fused.high:.3f}] on {fusion.examples} searches, {over.value:+.4f} "
        f"[{over.low:+.4f}, {over.high:+.4f}] over {fusion.best_single_name} alone"
    )


def rerank_lines(release: Release) -> list[str]:
    """Return what each cross-encoder brings."""
    return [
        f"{name}: a cross-encoder reads the first {found.depth} again (weight {found.weight:.1f}): {sub.score.metric} "
        f"{found.reranked.value:.3f} against {found.search.value:.3f} without it, {found.over_search.value:+.3f} "
        f"[{found.over_search.low:+.3f}, {found.over_search.high:+.3f}]"
        for name, sub in release.submodels.items()
        if (found := sub.rerank) is not None
    ]


def lineage_line(release: Release) -> str:
    """Return where a release comes from and what lies beside it; an empty text for one that does not tell."""
    if not release.papers:
        return ""
    passed = sum(gate.passed for gate in release.gates)
    return (
        f"commit {release.source.commit or 'none'}, replaces {release.replaces or 'nothing'}, {passed} of "
        f"{len(release.gates)} gates passed, papers: {', '.join(paper.name for paper in release.papers)}"
    )


def release_markdown(release: Release) -> str:
    """Return the table in Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *release_lines(release)]
    table = "\n".join("| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in rows)
    told = [text for text in (*rerank_lines(release), fusion_line(release)) if text]
    return "\n\n".join([table, *(f"{text[0].upper()}{text[1:]}." for text in told)])


def print_release(release: Release) -> None:
    """Print the table and the artifacts on standard output, as wide as they need."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 176)
    table = Table(
        *COLUMNS, title=f"Release {release.version}, profile {release.profile}: test period", title_justify="left"
    )
    for line in release_lines(release):
        table.add_row(*line)
    console.print(table)
    for told in (*rerank_lines(release), fusion_line(release), lineage_line(release)):
        if told:
            console.print(told, soft_wrap=True)
    for artifact in release.artifacts:
        console.print(f"  {artifact.bytes / 1e6:8.1f} MB  {artifact.kind:18}  {artifact.key}", soft_wrap=True)


def print_stage(verb: str, said: Mapping[str, Any]) -> bool:
    """Print what a stage noted as a table on standard output; return False where it has none."""
    lines = {"data": _data_lines, "evaluate": _score_lines, "split": _split_lines}.get(verb)
    if lines is None:
        return False
    for title, columns, rows in lines(said):
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        Console(highlight=False, width=None if sys.stdout.isatty() else 176).print(table)
    return True


Lines = list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]


def _data_lines(said: Mapping[str, Any]) -> Lines:
    """Return the rules of cleaning with what each took, and the counts of each period."""
    report, counts = said["joint"]["report"], said["joint"]["counts"]
    rules: list[tuple[str, ...]] = [
        (r["table"], r["rule"], f"{r['lines']:,}", f"{r['of']:,}", r["note"]) for r in report
    ]
    periods = {name: found for name, found in counts.items() if isinstance(found, Mapping)}
    kinds = sorted({kind for found in periods.values() for kind in found})
    rows: list[tuple[str, ...]] = [
        (name, *(f"{found.get(kind, 0):,}" for kind in kinds)) for name, found in periods.items()
    ]
    rows += [(name, f"{found:,}") for name, found in counts.items() if isinstance(found, int)]
    return [
        ("Cleaning", ("table", "rule", "lines", "of", "note"), rules),
        ("Counts", ("", *kinds), rows),
    ]


def _score_lines(said: Mapping[str, Any]) -> Lines:
    """Return each sub-model's figures on the test period."""

    def told(found: Mapping[str, float] | None, signed: bool = False) -> str:
        if found is None:
            return ""
        sign = "+" if signed else ""
        return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"

    rows: list[tuple[str, ...]] = []
    kinds: list[tuple[str, ...]] = []
    for name, score in said["joint"]["submodels"].items():
        rows.append(
            (
                name, f"{score['examples']} of {score['households']}", score["baseline_name"], told(score["baseline"]),
                told(score["before"]), told(score["after"]), told(score["over_baseline"], True),
            )
        )  # fmt: skip
        if teacher := score.get("teacher"):
            rows_of = f"on these rows: {teacher['name']}, its teacher"
            kinds.append((name, rows_of, str(score["examples"]), told(teacher), told(score["after"])))
        for group in ("kinds", "queries"):
            for kind, found in score.get(group, {}).items():
                rival = "baseline" if group == "kinds" else "BM25"
                if "after" in found:
                    kinds.append((name, kind, str(found["examples"]), told(found[rival]), told(found["after"])))
    return [
        ("nDCG@10 on the test period, 95 % intervals over households",
         ("sub-model", "of households", "strongest baseline", "baseline", "before", "after", "over baseline"), rows),
        ("The same, apart", ("sub-model", "of what", "examples", "baseline, BM25 or teacher", "after"), kinds),
    ]  # fmt: skip


def _split_lines(said: Mapping[str, Any]) -> Lines:
    """Return parameters and bytes of each stand-alone sub-model."""
    rows: list[tuple[str, ...]] = [
        (
            name, f"{cut['rows']:,}", f"{cut['parameters_own']:,}", f"{cut['bytes_own'] / 1e6:.2f}",
            f"{cut['parameters_shared']:,}", f"{cut['bytes_shared'] / 1e6:.2f}", f"{cut['error']:.0e}",
        )
        for name, cut in said.items()
    ]  # fmt: skip
    columns = ("sub-model", "rows", "own parameters", "MB", "of the trunk", "MB", "difference from the joint model")
    return [("Stand-alone sub-models in fp32", columns, rows)]
