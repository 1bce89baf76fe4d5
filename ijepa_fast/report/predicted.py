"""The pictures of what a predictor predicts, and their checks, as `visualise` left them in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ijepa_fast.report import pictures
from ijepa_fast.report.charts import line_chart
from ijepa_fast.report.page import table, text

HEAD = ["quantity", "seed", "everywhere", "inside", "outside"]
WINDOW = 100  # steps of training of which a loss is the mean
# What a control tells the decoder, for the sentences.
CONTROLS = {
    "shuffled": "another image's feature",
    "moved": "the feature of another block of the same context",
    "untrained": "the feature of a predictor before training",
    "nothing": "no feature",
}
TOLD = (
    "An image, what the context encoder sees of it, and what a decoder draws that is told nothing but {of}, averaged "
    "over the framed block. What all samples of a row share is in the feature, what varies is not. These images were "
    "kept from the decoder's training."
)
KINDS = {
    "prediction": "the predictor's output",
    "target": "the target encoder's features",
    "untrained": "the output of a predictor before training",
}


def rows_of(checks: list[dict[str, Any]]) -> list[list[str]]:
    """A table's rows of the "checks" that `visualise` wrote, columns of HEAD: values and their standard errors."""
    names = [(part, name) for part in ("denoising", "variance") for name in checks[0][part]]
    return [
        [f"{part}: {name}", str(check["seed"]), *(f"{value:.5f} ± {error:.5f}" for value, error in check[part][name])]
        for part, name in names
        for check in checks
    ]


def verdict(checks: list[dict[str, Any]]) -> list[str]:
    """Sentences of "checks": by how much each control raises the denoising loss inside the block, for each seed."""
    inside = HEAD.index("inside") - 2
    sentences = []
    for name, words in CONTROLS.items():
        if f"{name} - right" in checks[0]["denoising"]:
            pairs = [(c["denoising"][f"{name} - right"][inside], c["denoising"]["right"][inside][0]) for c in checks]
            costs = [f"{value / right:+.1%} ({value / error:.1f} s.e.)" for (value, error), right in pairs]
            sentences.append(f"Told {words}, the loss inside the block changes by {', '.join(costs)}.")
    return sentences


def sections(run: Path) -> list[tuple[str, str]]:
    """[(heading, HTML)] for the page of the run: a section for each kind that was drawn."""
    found = []
    for kind, words in KINDS.items():
        path, picture = (run / "pictures" / f"{kind}.{form}" for form in ("json", "png"))
        if not (path.is_file() and picture.is_file()):
            continue
        try:
            results = json.loads(path.read_text())
            checks, losses, made = results["checks"], results["losses"], results["made"]
            steps = [WINDOW * (number + 1) for number in range(len(losses))]
            with Image.open(picture) as image:
                sheet = pictures.tag(image, "PNG", "pixels")
            told = f"{TOLD.format(of=words)} {made['checkpoint']}, a decoder of {results['steps']:,} steps."
            html = text(told) + sheet + "".join(map(text, verdict(checks))) + table(HEAD, rows_of(checks), words=1)
            html += f'<div class="charts">{line_chart("Loss of the decoder", {"": (steps, losses)}, log=True)}</div>'
        except (ValueError, KeyError, IndexError, TypeError) as error:
            html = text(f"Not shown: {path} is not what visualise writes ({error!r}); run it again", "note")
        found.append((f"Pictures of the {kind}" if kind != "untrained" else "Pictures before training", html))
    return found
