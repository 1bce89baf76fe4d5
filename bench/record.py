"""What files of bench/results/ say: read, refused where no commit has what was measured, and where they are from."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HISTORY = "history.csv"  # beside the files: since when each is in the repository


class NoResult(ValueError):
    """There is no figure, and the message says why."""


def dirty(commit: str | None) -> bool:
    """Whether a commit's name is that of a tree with changes, which nobody else can have."""
    return bool(commit) and commit.endswith("-dirty")


def load(path: Path) -> Any:
    """The content of a JSON file of results. Raises NoResult for one that is not there or of a tree with changes."""
    if not path.is_file():
        raise NoResult(f"Not measured: there is no `{path.name}`.")
    result = json.loads(path.read_text())
    parts = [result, *result.get("records", [])] if isinstance(result, dict) else result
    if of_changes := sorted({part["commit"] for part in parts if dirty(part.get("commit"))}):
        raise NoResult(
            f"Refused: `{path.name}` was measured in a tree with changes that no commit has ({', '.join(of_changes)}); "
            "measure it again."
        )
    return result


def show(result: dict[str, Any], table: list[str], path: Path | None) -> None:
    """Print the lines of a result's table, and write the result as a JSON file where there is a path."""
    print("\n".join(table))
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """The rows of a CSV file, none if it is not there, and how many more were of trees with changes and are refused."""
    if not path.is_file():
        return [], 0
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    kept = [row for row in found if not dirty(row.get("commit"))]
    return kept, len(found) - len(kept)


def since(path: Path) -> str | None:
    """The date on which the file as it is came into the repository, None where bench/history.py has not seen it."""
    log, _ = rows(path.with_name(HISTORY))
    return max((row["date"] for row in log if row["file"] == path.name), default=None)


def origin(path: Path, facts: dict[str, Any]) -> str:
    """Device, date and commit; of a file from before they noted it, the date it came into the repository."""
    if commit := facts.get("commit"):
        return f"{facts['device']}; {facts['date'][:10]}, commit {commit[:12]}"
    came = since(path)
    return f"{facts['device']}; {f'{came[:10]}, ' if came else ''}commit not noted"


def when(path: Path, facts: dict[str, Any]) -> str:
    """A date to sort by: of the measurement, else since when the file is in the repository."""
    return facts.get("date") or since(path) or ""


def drawn_from(path: Path) -> str:
    """What a picture says of the file that it was drawn from, in its metadata."""
    return f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def made() -> dict[str, str]:
    """When and at which commit something is measured now, for the head of its file."""
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit()}


def commit() -> str:
    """The checkout's commit, with -dirty behind it where what is measured differs from it; unknown without git."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except OSError:  # there is no git
        return "unknown"
    if head.returncode:
        return "unknown"
    changed = git(
        "status", "--porcelain", "--", "ijepa_fast", "kernels", "csrc", "configs", "bench/*.py"
    ).stdout.strip()
    return head.stdout.strip() + ("-dirty" if changed else "")
