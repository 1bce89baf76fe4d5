"""Evaluate several encoders on the same images: one table with intervals, as JSON, and as one HTML page.

    python -m ijepa_fast compare runs/a runs/b --untrained
    python -m ijepa_fast compare runs/a IN1K-vit.h.14-300e.pth.tar hf/vit --data train --test val --page compare.html

An encoder is a run's folder, a checkpoint's, published weights, a Hugging Face or timm folder. Without --data they are
evaluated on the images of the first of them, a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ijepa_fast.command import one_sentence
from ijepa_fast.eval.differences import differences
from ijepa_fast.eval.evaluate import evaluate
from ijepa_fast.eval.figures import Figure, against
from ijepa_fast.eval.options import check
from ijepa_fast.interop.load import PretrainedEncoder, load
from ijepa_fast.probe import add_options, device_of, folders_of, open_parts, options_of, read_options, said
from ijepa_fast.report.comparison import comparison_page, comparison_table
from ijepa_fast.run.provenance import provenance
from ijepa_fast.run.sources import as_begun

UNTRAINED = ", untrained"


def named(paths: list[str], names: str | None) -> list[str]:
    """A name for each encoder: those that are given, or the last parts of the paths that tell them apart."""
    if names is not None:
        found = names.split(",")
        if len(found) != len(paths) or len(set(found)) < len(found):
            raise ValueError(f"--names: expected {len(paths)} different names, one for each encoder, got {names}")
        return found
    if len(set(paths)) < len(paths):
        raise ValueError("expected different encoders, got one twice")
    parts = [Path(path).parts for path in paths]
    for count in range(1, 1 + max(map(len, parts))):
        found = ["/".join(part[-count:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return list(paths)


def opened(options: argparse.Namespace) -> dict[str, PretrainedEncoder]:
    """The encoders by name, on the CPU, each run's with the one that it began with behind it where that is asked for.

    Raises ValueError where one cannot be read, or where they take different images.
    """
    found: dict[str, PretrainedEncoder] = {}
    for name, path in zip(named(options.encoders, options.names), options.encoders):
        encoder = load(path, options.network, options.image_size, "cpu", options.attention_heads)
        found[name] = encoder
        if options.untrained and (Path(path) / "config.yaml").is_file():
            found[name + UNTRAINED] = as_begun(path, encoder)
    if len(found) < 2:
        raise ValueError("expected two encoders or more to compare; one run with --untrained will do")
    if options.untrained and not any(name.endswith(UNTRAINED) for name in found):
        raise ValueError("--untrained: expected a run's folder among the encoders, which says how it began")
    (first, one), *others = found.items()
    for name, other in others:
        theirs, ours = (
            replace(encoder.arch.reading, channels=len(encoder.mean), where=None, fill=()) for encoder in (other, one)
        )
        if theirs != ours:
            raise ValueError(
                f"{name} reads images of {theirs.channels} channels of {theirs.depth}, {first} of {ours.channels} of "
                f"{ours.depth}{'' if theirs.window == ours.window else ', by other windows'}; they cannot be compared "
                "on the same images"
            )
        (h, w), (height, width) = other.arch.size, one.arch.size
        if h * width != w * height:
            raise ValueError(
                f"{name} takes images of {h} x {w} pixels, {first} of {height} x {width}, which show another part of "
                "an image; name one size with --image-size"
            )
    return found


def compare(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[Figure]]]:
    """Evaluate as the command line says; what is written as JSON, and the figures of each encoder.

    Raises ValueError for what a user can mend, before any of them is evaluated.
    """
    encoders = opened(options)
    device = device_of(options.device)
    folders = folders_of(options, options.encoders[0])
    train, test = open_parts(options, folders, next(iter(encoders.values())).arch.reading)
    asked = {name: options_of(options, encoder, device) for name, encoder in encoders.items()}
    for name, encoder in encoders.items():
        try:
            check(encoder, train, test, asked[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    figures: dict[str, list[Figure]] = {}
    for name, encoder in encoders.items():
        print(f"evaluating {name} ({len(figures) + 1} of {len(encoders)})", file=sys.stderr, flush=True)
        figures[name] = evaluate(encoder.to(device), train, test, asked[name])
        encoder.cpu()
    for name in encoders:
        if before := figures.get(name + UNTRAINED):
            figures[name] = against(figures[name], before)
    results = provenance(device) | {
        "data": {"train": str(folders[0]), "test": str(folders[1])},
        "encoders": [
            {
                "name": name,
                "arch": asdict(encoder.arch),
                "options": said(asked[name]),
                "figures": [figure.to_json() for figure in figures[name]],
            }
            for name, encoder in encoders.items()
        ],
        "differences": [row.to_json() for row in differences(figures)],
    }
    return results, figures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="ijepa-fast compare", description=__doc__.splitlines()[0])
    p.add_argument("encoders", nargs="+", metavar="ENCODER", help="a run, a checkpoint, weights, a folder of a library")
    p.add_argument("--names", metavar="A,B,...", help="what to call them; by default the ends of their paths")
    add_options(p, ("linear", "knn", "retrieval", "fewshot"))
    p.add_argument("--out", metavar="FILE.json", help="where to write the figures and their differences")
    p.add_argument("--page", metavar="FILE.html", help="where to write a page with the table and curves")
    return p


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """Evaluate, print the table, write what is asked for. Returns the exit status."""
    options = read_options(parser(), argv)
    for path in (options.out, options.page):
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: expected a file in a folder that is there")
    results, figures = compare(options)
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=2) + "\n")
    if options.page:
        Path(options.page).write_text(comparison_page(results, figures), encoding="utf-8")
    print(comparison_table(figures))
    return 0
