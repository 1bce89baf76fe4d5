"""One HTML page of a run, or of several beside each other: what was learned, how fast, and what features look like.

python -m ijepa_fast report RUN [RUN ...] [--images FOLDER] [--sample N] [--out FILE]

It opens without a network.
"""

from __future__ import annotations

import argparse
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ijepa_fast.command import one_sentence, whole
from ijepa_fast.config import Config, ConfigError
from ijepa_fast.data.importing import is_code
from ijepa_fast.data.kinds import printable
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.eval.collapse import LOW_RANK
from ijepa_fast.eval.rankme import rankme
from ijepa_fast.interop.load import latest, load
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.report import pictures, predicted, sections, several
from ijepa_fast.report.charts import line_chart
from ijepa_fast.report.page import page, text
from ijepa_fast.report.recorded import Recorded, read_run
from ijepa_fast.run.build import build_method
from ijepa_fast.run.sources import probe_folders, training_source, untrained

MOST_MASKS = 128  # images of the batch whose masks are drawn: a policy that truncates depends on their number


def report(run: str | Path, images: str | Path | None = None, count: int = 400) -> str:
    """The page of the run in folder `run`, as HTML.

    images: a folder, instead of the run's own held-out (or else training) images. count: how many of them to encode.
    What cannot be shown (no checkpoint yet, images that are gone, an old summary) is said on the page. Raises
    ValueError for a folder that is no run.
    """
    found = read_run(run)
    parts = [("Probes", sections.figures(found) + sections.probes([found]))]
    parts += [("Health", sections.health([found])), ("Training", sections.training([found]))]
    parts.append(("Speed", sections.speed([found])))
    checkpoint = latest(found.folder)
    if checkpoint is None:
        parts.append(("Features", text("The run has no checkpoint yet, so there are no features to show.", "note")))
    elif found.config is not None:
        try:
            parts += _features(found.config, checkpoint, images, count)
        except (ValueError, OSError) as error:
            parts.append(("Features", text(f"Not shown: {printable(str(error))}", "note")))
    parts += predicted.sections(found.folder)
    footer = f"{printable(found.folder.name)}, after step {found.steps:,}"
    if checkpoint:
        footer += f", features of {checkpoint.name}"
    return page(found.name, sections.cards(found), parts, found.yaml, footer, _lead(found))


def _lead(run: Recorded) -> str:
    """The verdict, where it comes from, and what is missing."""
    said, kind = sections.said_of(run.figures)
    if said:
        lead = text(f"{said[0].upper()}{said[1:]}.", f"verdict {kind}".strip())
    else:
        before = any(f.untrained is not None for f in run.figures)
        why = f"{'standard errors' if before else 'figures of the untrained encoder'} are not known"
        lead = text(f"No verdict: {'the run has not finished' if run.summary is None else why}.", "verdict")
    facts = run.facts()
    command = facts.pop("command")
    items = "".join(f"<li><span>{html.escape(name)}</span>{html.escape(fact)}</li>" for name, fact in facts.items())
    lead += f'<ul class="facts">{items}</ul>'
    if command != "not recorded":
        lead += f'<pre class="command">{html.escape(command)}</pre>'
    else:
        lead += text("Its command was not recorded: the run was started by an earlier version.", "note")
    return lead + "".join(text(sentence, "note") for sentence in run.missing)


def _features(config: Config, checkpoint: Path, images: str | Path | None, count: int) -> list[tuple[str, str]]:
    """Sections of what the target encoder in `checkpoint` makes of sample images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load(checkpoint, device=device)
    source = _source(config, images)
    try:
        before = untrained(config, torch.device(device), foreign=False)
    except ConfigError:  # of a method that is code from elsewhere
        before = None
    sample = pictures.take_sample(source, encoder, count, device, config.seed, before)
    size = len(sample.pooled)
    found = [("Spectrum", _spectrum(sample))]
    found += _masks(config, sample)
    told = f"By cosine similarity of standardised, average-pooled features, among {size} images of "
    told += f"{printable(Path(source.root).name)}; in green those of the same class."
    found.append(("Nearest neighbours", text(told) + pictures.neighbours_gallery(sample)))
    if sample.patches.shape[1] == 1:
        return found  # a class token
    told = "The first three principal components of patch features, as red, green and blue; the mean at each place is "
    told += "taken off first."
    found.append(("Patch features", text(told) + pictures.pca_gallery(sample, encoder.encoder.grid)))
    return found


def _spectrum(sample: pictures.Sample) -> str:
    """RankMe and the singular values of the features, beside those of the untrained encoder on the same images."""
    size, dim = sample.pooled.shape
    features = {"trained": sample.pooled} | ({} if sample.before is None else {"untrained": sample.before})
    lines = {}
    for name, values in features.items():
        spectrum = pictures.spectrum(values)
        lines[name] = np.arange(1, len(spectrum) + 1), spectrum
    ranks = ", ".join(f"{rankme(values):.1f} {name}" for name, values in features.items())
    told = f"RankMe is {ranks}, of at most {min(size, dim)}: how many directions the {dim} pooled features of {size} "
    told += f"images use. In two of three runs that fell below {LOW_RANK:.0%} of the untrained encoder's, probes were "
    told += "worse than before training."
    title = "Singular values of the features, over the largest"
    chart = line_chart(title, lines, log=True, wide=True, x_label="number", note=f"RankMe {ranks}")
    return text(told) + f'<div class="charts">{chart}</div>'


def _masks(config: Config, sample: pictures.Sample) -> list[tuple[str, str]]:
    """The section of the masks; none of a method that draws others."""
    try:
        with torch.device("meta"):
            method = build_method(config, foreign=False)
    except ConfigError as error:
        return [("Masks", text(f"Not shown: {error}", "note"))]
    packed = method.draw(min(config.batch_size, MOST_MASKS), config.seed, 0, 0)
    if not isinstance(packed, MaskDraw):
        return []
    told = "The image, what the encoder sees of it, and what is predicted"
    told += f": {config.mask.strategy}, context policy {config.mask.policy}" if method.reads_mask else ""
    told += f", in a batch of {packed.images}."
    return [("Masks", text(told) + pictures.masks_gallery(sample.images, packed, config.model.patch))]


def _source(config: Config, images: str | Path | None) -> Source:
    if images is not None:
        return open_source(images, reading=config.data.reading)
    folders = probe_folders(config)
    named = folders[1] if folders else config.data.source
    if is_code(named):  # a run's folder from elsewhere must not run code
        raise ValueError(f"{named} is code, which only training imports; name images with --images FOLDER")
    source = open_source(folders[1], reading=config.data.reading) if folders else training_source(config)
    if source is None:
        raise ValueError(f"data.source={config.data.source} has no images to show; name some with --images FOLDER")
    return source


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(
        prog="ijepa-fast report", description="Make one HTML page of a run, or of several beside each other."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder; several are compared with the first")
    parser.add_argument("--images", metavar="FOLDER", help="images to show (default: the probes', or the training's)")
    parser.add_argument(
        "--sample", type=whole(), default=400, metavar="N", help="how many to encode (default %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html, of several runs comparison.html")
    args = parser.parse_args(argv)
    if args.sample < 2:
        raise ValueError(f"--sample: expected at least 2, got {args.sample}")
    if len(args.runs) > 1 and args.images:
        raise ValueError("--images: features are shown of one run; leave it out to compare several")
    document = _of(args.runs, args.images, args.sample)
    out = Path(args.out or (Path(args.runs[0]) / "report.html" if len(args.runs) == 1 else "comparison.html"))
    out.write_text(document, encoding="utf-8")
    print(printable(str(out)))
    return 0


def _of(runs: Sequence[str], images: str | None, count: int) -> str:
    return report(runs[0], images, count) if len(runs) == 1 else several.report(runs)
