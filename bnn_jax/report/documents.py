"""Tables in the documents of the project, written anew from its result files.

A document marks a table with the lines ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what stands between them
is replaced. ``NAME`` is a key of ``TABLES``, or 'results: METHOD' or 'differences: METHOD' for the rows of one method.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bnn_jax import files, run_files
from bnn_jax.errors import UserError
from bnn_jax.report.results import DIFFERENCES, FOLDER, TEXT, Accuracy, Published, Row, read_published, read_rows

DIFFERENCE = [{**dict.fromkeys(("method", "topic", "paper", "release", "switch"), TEXT), "measured": [[TEXT]]}]
MISSING = "-"
METHODS = {
    **{"asbq": "ASBQ", "skd": "SKD-BNN, IR-Net", "snn": "SNN", "recu": "ReCU", "weight_search": "Weight Search"},
    "basq": "BASQ",
}
MARKED = re.compile(r"(<!-- table: ([\w :-]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """The documents that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("**/*.md"))]


def rewrite(root: Path) -> list[Path]:
    """Writes the tables of all documents anew; returns those that have changed.

    Raises:
      UserError: a result is incomplete, or a document names a table that does not exist.
    """
    rows, changed = read_rows(root / FOLDER), []
    for path in documents(root):
        old = path.read_text(encoding="utf-8")
        new = rewritten(old, rows, root / FOLDER, name=str(path))
        if new != old:
            with files.replacing(path) as file:
                file.write(new)
            changed.append(path)
    return changed


def rewritten(text: str, rows: Sequence[Row], folder: Path, *, name: str) -> str:
    """A document with the tables that belong into it.

    Args:
      text: the document.
      rows: rows of the results.
      folder: folder of the result files.
      name: of the document, for the error.

    Raises:
      UserError: it names a table that does not exist.
    """

    def table(found: re.Match) -> str:
        kind, _, method = found[2].partition(": ")
        if kind not in TABLES or (method and method not in METHODS):
            raise UserError(f"{name}: table {found[2]!r}: accepted are {', '.join(TABLES)}")
        own = [row for row in rows if method in ("", row.method)]
        return f"{found[1]}{TABLES[kind](own, folder, method)}\n{found[3]}"

    return MARKED.sub(table, text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def summary_table(rows: Sequence[Row], _: Path, __: str) -> str:
    """What the README shows: the rows that say they belong there."""
    columns = ("what", "epochs", "top-1 last", "best on test", "published")
    shown = [row for row in rows if row.headline]
    return table(columns, [(row.title, _epochs(row), str(row.last), _text(row.best), _published(row)) for row in shown])


def results_table(rows: Sequence[Row], _: Path, method: str) -> str:
    """Every result beside what was published, and why they differ."""
    if not rows:
        return f"No run of {METHODS.get(method, 'any method')} has been recorded yet."
    columns = ("what", "epochs", "images", "top-1 last", "best on test", "published", "why it differs")
    gaps = [row.gap for row in rows]
    # The stages of a run, and the runs of a series, share one text, which is long.
    shown = ["as above" if gap and gap == before else gap or MISSING for before, gap in zip(("", *gaps), gaps)]
    return table(columns, [(*_full(row), gap) for row, gap in zip(rows, shown)])


def _full(row: Row) -> tuple[str, ...]:
    images = f"{_count(row.num_train)} / {_count(row.num_test)}"
    return row.title, _epochs(row), images, str(row.last), _text(row.best), _published(row)


def _epochs(row: Row) -> str:
    """Epochs that were run, of those published."""
    if row.epochs is None:
        return MISSING
    length = row.published.epochs if row.published else None
    return f"{row.epochs} of {length}" if length else str(row.epochs)


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _text(accuracy: Accuracy | None) -> str:
    return MISSING if accuracy is None else str(accuracy)


def _published(row: Row) -> str:
    """What was published for the same epoch, where there is a curve, and for the whole run."""
    reference = row.published
    if reference is None:
        return MISSING
    ends = ", ".join(
        f"{value:.2f} {name}" for name, value in (("last", reference.last), ("best", reference.best)) if value
    )
    if reference.curve and row.epochs is not None and row.epochs < len(reference.curve):
        plural = "s" if row.epochs > 1 else ""
        return f"{reference.curve[row.epochs - 1]:.2f} after {row.epochs} epoch{plural}; {ends}"
    return ends


def commands_table(rows: Sequence[Row], _: Path, __: str) -> str:
    """The command of each row."""
    seeds = {row.files: f" (seeds {', '.join(map(str, row.seeds))})" if len(row.seeds) > 1 else "" for row in rows}
    return table(
        ("what", "command", "file"),
        [
            (row.title, f"`{row.command}`{seeds[row.files]}", ", ".join(f"`results/{name}.json`" for name in row.files))
            for row in rows
        ],
    )


def sizes_table(rows: Sequence[Row], _: Path, __: str) -> str:
    """What the networks cost, beside their accuracy."""
    columns = ("what", "bits per weight", "stored bits, floats included", "bit operations", "top-1 last")
    known = [row for row in rows if row.stored_bits is not None]
    return table(
        columns,
        [
            (row.title, f"{row.bits:.3g}", _count(row.stored_bits), _count(row.bit_operations or None), str(row.last))
            for row in known
        ],
    )


def published_table(_: Sequence[Row], folder: Path, __: str) -> str:
    """The published numbers and where they stand."""

    def cells(entry: Published) -> tuple[str, ...]:
        last = MISSING if entry.last is None else f"{entry.last:.2f}"
        return entry.title, _count(entry.epochs), last, f"{entry.best:.2f}", entry.source, entry.note

    return table(
        ("what", "epochs", "last", "best", "source", "to know"),
        [cells(entry) for entry in read_published(folder).values()],
    )


def differences_table(rows: Sequence[Row], folder: Path, method: str) -> str:
    """Where paper and released program differ, what selects either, and the effect that was measured."""
    found = read_differences(folder)
    last = {(name, row.stage): row.last for row in rows for name in row.files}

    def cells(entry: dict[str, Any]) -> tuple[str, ...]:
        effects = []
        for label, name, stage in entry["measured"]:
            if (name, stage) not in last:
                raise UserError(f"{folder / DIFFERENCES}: {name}, {stage}: there is no such result")
            effects.append(f"{label} {last[name, stage]}")
        effect = "; ".join(effects) or "not measured"
        named = () if method else (METHODS[entry["method"]],)
        return *named, entry["topic"], entry["paper"], entry["release"], entry["switch"], effect

    columns = ("topic", "paper, or preset closest to it", "released program", "switch (`config.…`)", "effect, top-1")
    own = [entry for entry in found if method in ("", entry["method"])]
    return table(columns if method else ("method", *columns), [cells(entry) for entry in own])


def read_differences(folder: Path) -> list[dict[str, Any]]:
    """What differs between papers and released programs.

    Raises:
      UserError: the file is damaged.
    """
    try:
        content = run_files.parse((folder / DIFFERENCES).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / DIFFERENCES}: {error}") from None
    if wrong := run_files.problem(content, DIFFERENCE):
        raise UserError(f"{folder / DIFFERENCES}: {wrong}")
    return content


TABLES: dict[str, Callable[[Sequence[Row], Path, str], str]] = {
    "summary": summary_table,
    "results": results_table,
    "commands": commands_table,
    "sizes": sizes_table,
    "published": published_table,
    "differences": differences_table,
}
