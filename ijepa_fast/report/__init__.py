"""One HTML page of a run: what it learned, how fast, and what its features look like. It opens without a network.

python -m ijepa_fast report RUN [--images FOLDER] [--sample N] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast.command import one_sentence, whole
from ijepa_fast.config import Config, ConfigError, load_config
from ijepa_fast.data.importing import is_code
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.eval.figures import CLEAR, cells, figures_of, headline, verdict
from ijepa_fast.eval.rankme import rankme
from ijepa_fast.interop.load import latest, load
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.report import pictures, predicted
from ijepa_fast.report.charts import line_chart
from ijepa_fast.report.page import page, table, text
from ijepa_fast.report.plots import read_log
from ijepa_fast.report.summary import SEEN, read_summary
from ijepa_fast.run.build import build_method
from ijepa_fast.run.log import newest
from ijepa_fast.run.sources import probe_folders, training_source

Record = dict[str, Any]  # a line of the log
Series = dict[str, dict[str, tuple[list[int], list[float]]]]  # {metric: {label: (steps, values)}}

RANK = (
    "rankme",
    "target_variance",
    "position_share",
    "feature_norm",
    "lidar",
)  # metrics of the online probe that belong to the section of the rank
TITLES = {
    "accuracy": "Accuracy",
    "r2": "R²",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "mean_absolute_error": "Mean absolute error",
}
EMA = "Momentum of the EMA"  # under "momentum" in logs of earlier versions
MOST_MASKS = 128  # images of the batch whose masks are drawn: a policy that truncates depends on their number


def report(run: str | Path, images: str | Path | None = None, count: int = 400) -> str:
    """The page of the run in folder `run`, as HTML.

    images: a folder, instead of the run's own held-out (or else training) images. count: how many of them to encode.
    What cannot be shown (no checkpoint yet, images that are gone, an old summary) is said on the page. Raises
    ValueError for a folder that is no run.
    """
    run = Path(run)
    for name in ("config.yaml", "log.jsonl"):
        if not (run / name).is_file():
            raise ValueError(f"{run}: expected the folder of a run, with config.yaml and log.jsonl; {name} is missing")
    config, records = load_config(run / "config.yaml"), read_log(run / "log.jsonl")
    training = [record for record in records if "loss" in record]
    if not training:
        raise ValueError(f"{run}/log.jsonl: expected at least one record with a loss; wait for the first")
    sections = [("Training", _training(training)), ("Speed", _speed(training))]
    online = _online(records)
    sections.append(("Probes", _figures(run) + _probes(online)))
    checkpoint, ranks = latest(run), _charts({metric: online[metric] for metric in RANK if metric in online})
    if ranks:
        told = text("Of the targets while training, and of the run's first images; a collapsed encoder has RankMe 1.")
        if advice := records[-1].get("probe", {}).get("advice") or newest(run / "log.jsonl", "probe", "advice"):
            told += text(f"The last that was said of it: {advice}.", "note")
        sections.append(("Rank", told + ranks))
    if checkpoint is None:
        sections.append(("Features", text("The run has no checkpoint yet, so there are no features to show.", "note")))
    else:
        try:
            sections += _features(config, checkpoint, images, count)
        except ValueError as error:
            sections.append(("Features", text(f"Not shown: {error}", "note")))
    sections += predicted.sections(run)
    footer = f"{run.name}, after step {records[-1]['step']}"
    if checkpoint:
        footer += f", features of {checkpoint.name}"
    return page(config.name, _head(config, training), sections, (run / "config.yaml").read_text(), footer)


def _head(config: Config, training: list[Record]) -> dict[str, str]:
    rate = np.median([record["images_per_second"] for record in training])
    tokens = np.mean([record["tokens_per_image"] for record in training])
    model = config.model
    steps, seen = training[-1]["step"], training[-1].get("images")
    one_size = seen is None or seen == steps * config.batch_size
    return {
        "steps": f"{steps:,} <small>of {config.batch_size:,} images</small>"
        if one_size
        else f"{steps:,} <small>of {seen:,} images in all</small>",
        "loss": f"{training[0]['loss']:.4f} → {training[-1]['loss']:.4f}",
        "images per second": f"{rate:,.0f} <small>at {tokens:.0f} tokens</small>",
        "waiting for data": f"{100 * np.mean([record['data_wait'] for record in training]):.2g}%",
        "encoder": f"{model.depth} blocks <small>of width {model.dim}, patch {model.patch}</small>",
    }


def _column(records: list[Record], key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in found], [value for _, value in found]


def _training(training: list[Record]) -> str:
    steps, losses = _column(training, "loss")
    figure = line_chart("Loss", {"loss": (steps, losses)}, wide=True, log=all(loss > 0 for loss in losses))
    terms = [{"step": record["step"]} | record.get("loss_terms", {}) for record in training]
    charts = [line_chart("Terms of the loss", {name: _column(terms, name) for name in terms[-1] if name != "step"})]
    titles = {"lr": "Learning rate", "weight_decay": "Weight decay", "ema": EMA, "momentum": EMA}
    titles["tokens_per_image"] = "Tokens per image"
    charts += [line_chart(title, {"": _column(training, key)}) for key, title in titles.items()]
    return f'<div class="charts">{figure}{"".join(charts)}</div>'


def _speed(training: list[Record]) -> str:
    rate = line_chart("Images per second", {"": _column(training, "images_per_second")}, floor=0)
    wait = line_chart("Share of the time waiting for data", {"": _column(training, "data_wait")}, floor=0, percent=True)
    bad = training[-1].get("replaced", 0)
    told = text(f"{bad} unreadable images were replaced.", "note") if bad else ""
    return f'{told}<div class="charts">{rate}{wait}</div>'


def _figures(run: Path) -> str:
    """The table of the figures in the run's summary."""
    try:
        summary = read_summary(run)
    except ValueError as error:
        return text(f"Not shown: {error}", "note")
    figures = headline(figures_of(summary)) if summary else []
    if not figures:
        told = "The encoder was not evaluated on labelled images: the run has not finished, or probe.test is not set."
        return text(told, "note")
    head, rows = cells(figures)
    better = [(row, head.index("value")) for row, figure in enumerate(figures) if figure.improved]
    where = "training images that the probe did not see" if (summary or {}).get(SEEN) else "test images"
    told = f"Of frozen features of the trained encoder, on {where}; s.e. is the standard error over these images. "
    told += f"Stressed is what is better than before training by more than {CLEAR} standard errors of the difference."
    said = verdict(figures)
    return (text(said[0].upper() + said[1:] + ".", "verdict") if said else "") + text(told) + table(head, rows, better)


def _probes(online: Series) -> str:
    charts = _charts({metric: series for metric, series in online.items() if metric not in RANK})
    if not charts:
        return text(
            "There was no probe while training: probe.every is 0, or the training images have no labels.", "note"
        )
    return text("While training, on training images: for comparing one step with another.") + charts


def _online(records: list[Record]) -> Series:
    """The numbers of the online probe in the log."""
    found: Series = {}
    for record in records:
        for (*probe, metric), value in _numbers(record.get("probe", {})):
            steps, values = found.setdefault(metric, {}).setdefault(" ".join(probe), ([], []))
            steps.append(record["step"])
            values.append(value)
    return found


def _charts(metrics: Series) -> str:
    charts = [line_chart(TITLES.get(m, m.replace("_", " ").capitalize()), series) for m, series in metrics.items()]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _numbers(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, key), value


def _features(config: Config, checkpoint: Path, images: str | Path | None, count: int) -> list[tuple[str, str]]:
    """Sections of what the target encoder in `checkpoint` makes of sample images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load(checkpoint, device=device)
    source = _source(config, images)
    sample = pictures.take_sample(source, encoder, count, device, config.seed)
    size, dim = sample.pooled.shape
    rank = rankme(sample.pooled)
    values = pictures.spectrum(sample.pooled)
    chart = line_chart(
        "Singular values of the features, over the largest",
        {"": (np.arange(1, len(values) + 1), values)},
        log=True,
        wide=True,
        x_label="number",
        note=f"RankMe {rank:.1f}",
    )
    told = f"Of the {dim} pooled features of {size} images. RankMe is {rank:.1f} of at most {min(size, dim)}."
    sections = [("Spectrum", text(told) + f'<div class="charts">{chart}</div>')]
    sections += _masks(config, sample)
    told = f"By cosine similarity of standardised, average-pooled features, among {size} images of "
    told += f"{Path(source.root).name}; in green those of the same class."
    sections.append(("Nearest neighbours", text(told) + pictures.neighbours_gallery(sample)))
    if sample.patches.shape[1] == 1:
        return sections  # a class token
    told = "The first three principal components of patch features, as red, green and blue; the mean at each place is "
    told += "taken off first."
    sections.append(("Patch features", text(told) + pictures.pca_gallery(sample, encoder.encoder.grid)))
    return sections


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
    parser = argparse.ArgumentParser(prog="ijepa-fast report", description="Make one HTML page of a run.")
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--images", metavar="FOLDER", help="images to show (default: the probes', or the training's)")
    parser.add_argument(
        "--sample", type=whole(), default=400, metavar="N", help="how many to encode (default %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.run) / "report.html")
    if args.sample < 2:
        raise ValueError(f"--sample: expected at least 2, got {args.sample}")
    out.write_text(report(args.run, args.images, args.sample), encoding="utf-8")
    print(out)
    return 0
