"""Evaluate an encoder on labelled images, as the paper does and more.

    python -m ijepa_fast probe --checkpoint runs/photos --data /data/imagenet/train --test /data/imagenet/val
    python -m ijepa_fast probe --checkpoint runs/quickstart --probes linear,knn,attentive,lowshot,finetune --seeds 3

Layouts of labelled images are in eval/labels.py. Without --data, a run is evaluated on the images that its own
configuration names.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ijepa_fast.config import load_config
from ijepa_fast.data.dali import eval_batches
from ijepa_fast.eval.attentive import DenseFeatures, attentive_scores, fit_attentive
from ijepa_fast.eval.knn import KS
from ijepa_fast.eval.labels import Labelled, Samples, match, open_labelled, read_features
from ijepa_fast.eval.linear import HEADS
from ijepa_fast.eval.lowshot import PAPER_TUNING, SMALL_TUNING, FineTuning, draw_share, fine_tune
from ijepa_fast.eval.results import over_seeds, table
from ijepa_fast.eval.suite import PROTOCOLS, Outputs, fit_head, measure, probe_knn
from ijepa_fast.interop.load import PretrainedEncoder, load
from ijepa_fast.run.probing import probe_folders

LAST = 4  # layers that "last4" concatenates
TUNINGS = {"paper": PAPER_TUNING, "small": SMALL_TUNING}


@dataclass
class Split:
    """One half of an evaluation: the images that could be decoded, and what is known of each.

    rows: int64 (n,) of `part.source`. features: {set: (n, D)} and labels {column: (n,)} on the device.
    """

    part: Labelled
    rows: np.ndarray
    features: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]


@dataclass
class Evaluation:
    """An encoder, its features of the training and the test images, and how heads are to be trained on them.

    encoder: PretrainedEncoder in fp32; frozen: the same in the precision of the features.
    """

    encoder: PretrainedEncoder
    frozen: PretrainedEncoder
    train: Split
    test: Split
    device: torch.device
    resize: int
    sets: tuple[str, ...] = ("last",)
    heads: tuple[str, ...] = HEADS
    protocol: str = "fast"
    seeds: int = 1
    share: float = 0.01
    tuning: FineTuning = field(default_factory=lambda: PAPER_TUNING)

    def linear(self, name: str, outputs: Outputs) -> dict:
        """A linear head on each set of features, and of these the one that was best on the held-out images."""
        rows = {label: [] for label in [*self.sets, *["best"][: len(self.sets) - 1]]}
        for seed in range(self.seeds):
            for features in self.sets:
                x, x_test = self.train.features[features], self.test.features[features]
                head = fit_head(x, outputs.targets, outputs.task, self.protocol, self.heads, seed)
                figures = measure(outputs.decode(head(x_test)), self.test.labels[name], outputs.task)
                rows[features].append(figures | head.chosen | {"features": features})
            if "best" in rows:
                rows["best"].append(max((rows[features][-1] for features in self.sets), key=lambda r: r["held_out"]))
        return {f"linear, {label}": over_seeds(runs) for label, runs in rows.items()}

    def knn(self, name: str, outputs: Outputs) -> dict:
        """k-NN on the first set of features."""
        x, x_test = self.train.features[self.sets[0]], self.test.features[self.sets[0]]
        found = probe_knn(x, outputs, x_test, self.test.labels[name], KS)
        return {f"k-NN, k={k}": over_seeds([figures]) for k, figures in found.items()}

    def attentive(self, name: str, outputs: Outputs) -> dict:
        """An attentive head on the patch features."""
        runs = []
        dense, dense_test = self._dense
        outputs = Outputs(outputs.task, self.train.labels[name].cpu())
        for seed in range(self.seeds):
            head, chosen = fit_attentive(dense, self.train.rows, outputs, self.encoder.arch.heads, seed=seed)
            scores, _ = attentive_scores(head, dense_test, self.test.rows)
            runs.append(measure(outputs.decode(scores), self.test.labels[name].cpu(), outputs.task) | chosen)
        return {"attentive": over_seeds(runs)}

    def lowshot(self, name: str, outputs: Outputs) -> dict:
        """A linear head fitted to convergence on a share of the labels, drawn anew by each seed."""
        if outputs.classes is None:
            return {}
        runs = []
        for seed in range(self.seeds):
            chosen = torch.from_numpy(draw_share(outputs.targets.cpu(), self.share, seed))
            x, y = self.train.features[self.sets[0]][chosen], outputs.targets[chosen]
            head = fit_head(x, y, outputs.task, "exact", self.heads, seed)
            scores = head(self.test.features[self.sets[0]])
            runs.append(measure(outputs.decode(scores), self.test.labels[name], outputs.task) | head.chosen)
        return {f"low-shot {self.share:.3g} of labels, linear": over_seeds(runs)}

    def finetune(self, name: str, outputs: Outputs) -> dict:
        """The whole encoder trained on a share of the labels, the same that `lowshot` draws."""
        if outputs.classes is None:
            return {}
        runs = []
        for seed in range(self.seeds):
            chosen = draw_share(outputs.targets.cpu(), self.share, seed)
            rows, y = self.train.rows[chosen], outputs.targets.cpu()[chosen]
            source = self.train.part.source
            classifier = fine_tune(self.encoder, source, rows, y, outputs.count, self.tuning, seed)
            with torch.no_grad():
                batches = self._batches(self.test.part, self.test.rows, 256)
                scores = torch.cat([classifier(images.to(self.device)) for images, _ in batches])
            runs.append(measure(outputs.decode(scores), self.test.labels[name], outputs.task))
        return {f"low-shot {self.share:.3g} of labels, fine-tuned": over_seeds(runs)}

    def _batches(self, part: Labelled, rows: np.ndarray, batch: int):
        interpolation = self.encoder.arch.interpolation
        options = {"batch_size": batch, "crop": self.encoder.crop, "resize": self.resize, "device": self.device}
        return eval_batches(Samples(part.source, rows), interpolation=interpolation, **options)

    @cached_property
    def _dense(self) -> tuple[DenseFeatures, DenseFeatures]:
        train, test = (
            DenseFeatures(self.frozen, partial(self._batches, split.part), split.rows, self.device)
            for split in (self.train, self.test)
        )
        return train, test


PROBES = {
    "linear": Evaluation.linear,
    "knn": Evaluation.knn,
    "attentive": Evaluation.attentive,
    "lowshot": Evaluation.lowshot,
    "finetune": Evaluation.finetune,
}


def encode_layers(encoder: PretrainedEncoder, sets: tuple[str, ...]):
    """images -> list of (b, N, D): the final LayerNorm's output for "last", the last four blocks' for "last4"."""

    def encode(images):
        if sets == ("last",):
            return encoder(images)
        layers = encoder.layers(images, LAST)
        return [encoder.encoder.norm(layers[-1].flatten(0, 1)).view_as(layers[-1]), *layers]

    return encode


def read_split(encoder, part: Labelled, sets, images: int | None, device, **options) -> Split:
    """Encode `part`, or `images` of it. options: of eval_batches."""
    features, rows = read_features(encode_layers(encoder, sets), part, part.rows(images), device, **options)
    parts = {}
    if "last" in sets:
        parts["last"] = features[:, : encoder.dim].to(device)
    if "last4" in sets:
        parts["last4"] = features[:, -LAST * encoder.dim :].to(device)
    labels = {name: values.to(device) for name, values in part.at(rows).items()}
    return Split(part, rows.numpy(), parts, labels)


def evaluate(evaluation: Evaluation, probes) -> dict:
    """{task's name: {"task": kind, "probes": {probe: figures over seeds}}}; see results.over_seeds."""
    results = {}
    for name, task in evaluation.train.part.tasks.items():
        outputs, truth = Outputs(task, evaluation.train.labels[name]), evaluation.test.labels[name]
        found = {"chance": over_seeds([measure(outputs.chance(len(truth)), truth, task)])}
        for probe in probes:
            print(f"{name}: {probe}", file=sys.stderr)
            found |= PROBES[probe](evaluation, name, outputs)
        results[name] = {"task": task, "probes": found}
    return results


def _folders(options) -> tuple[str, str]:
    if (options.data is None) != (options.test is None):
        raise ValueError("--data, --test: expected both, the images to train heads on and those to test them on")
    if options.data is not None:
        return options.data, options.test
    path = Path(options.checkpoint) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"--data: expected a folder of labelled images, for {options.checkpoint} is no run's folder")
    folders = probe_folders(load_config(path))
    if folders is None:
        raise ValueError(f"--data: expected a folder of labelled images, for {path} names none (probe.test is not set)")
    return folders


def probe(options: argparse.Namespace) -> dict:
    """Evaluate as the command line says; what is written as JSON. Raises ValueError for what a user can mend."""
    folders = _folders(options)
    cuda = torch.cuda.is_available()
    device = torch.device({"auto": "cuda" if cuda else "cpu"}.get(options.device, options.device))
    if device.type == "cuda" and not cuda:
        raise ValueError("--device cuda: torch sees no CUDA device; leave --device out")
    encoder = load(options.checkpoint, options.network, options.image_size, device, options.attention_heads)
    if "last4" in options.features and len(encoder.encoder.blocks) < LAST:
        raise ValueError(f"--features last4: the encoder has {len(encoder.encoder.blocks)} layers; use --features last")
    frozen = encoder
    if options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda"):
        frozen = load(options.checkpoint, options.network, options.image_size, device, options.attention_heads)
        frozen.to(torch.bfloat16)
    tasks = dict(item.split("=", 1) for item in options.task)
    train, test = (open_labelled(folder, cache=options.cache, tasks=tasks) for folder in folders)
    train = _only(train, options.labels)
    resize = options.resize or encoder.crop
    reading = {"crop": encoder.crop, "resize": resize, "interpolation": encoder.arch.interpolation}
    train, test = (
        read_split(frozen, part, options.features, options.images, device, batch_size=options.batch_size, **reading)
        for part in (train, match(train, test))
    )
    changes = {"epochs": options.finetune_epochs, "rate": options.finetune_rate, "batch": options.finetune_batch}
    evaluation = Evaluation(
        encoder,
        frozen,
        train,
        test,
        device,
        resize,
        options.features,
        options.heads,
        options.protocol,
        options.seeds,
        options.share,
        replace(TUNINGS[options.finetune], **{key: value for key, value in changes.items() if value is not None}),
    )
    results = evaluate(evaluation, options.probes)
    return {
        "checkpoint": str(options.checkpoint),
        "network": options.network,
        "arch": asdict(encoder.arch),
        "data": {"train": str(folders[0]), "test": str(folders[1])},
        "images": {"train": len(train.rows), "test": len(test.rows)},
        "protocol": options.protocol,
        "seeds": options.seeds,
        "results": results,
    }


def _only(part: Labelled, names: tuple[str, ...] | None) -> Labelled:
    if names is None:
        return part
    for name in names:
        if name not in part.tasks:
            raise ValueError(f"--labels {name}: {part.source.root} has {', '.join(part.tasks)}")
    return replace(part, tasks={name: part.tasks[name] for name in names})


def _among(choices):
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(choices):
            raise argparse.ArgumentTypeError(f"expected of {','.join(choices)}, got {','.join(sorted(unknown))}")
        return names

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m ijepa_fast probe", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--checkpoint", required=True, help="a run, a checkpoint, a published .pth.tar, a Hugging Face folder")
    add("--data", help="labelled images to train heads on: folders, shards, a list, labels.csv, Clevr's images/train")
    add("--test", help="labelled images to test on, in the same layout")
    add("--probes", type=_among(PROBES), default=("linear", "knn"), help=f"of {','.join(PROBES)}")
    add("--network", choices=("target_encoder", "encoder"), default="target_encoder")
    add(
        "--features",
        type=_among(("last", "last4")),
        default=("last",),
        help="last, last4 (concatenated), or last,last4",
    )
    add("--heads", type=_among(HEADS), default=HEADS, help=f"of {','.join(HEADS)}; the best on held-out images is kept")
    add("--protocol", choices=PROTOCOLS, default="fast", help="paper: LARS, batch 16,384, 50 epochs; exact: converged")
    add("--seeds", type=int, default=1, help="of splits and heads; from 2 on, 95 %% intervals are given")
    add("--labels", type=lambda text: tuple(text.split(",")), help="label columns to probe; all by default")
    add("--task", action="append", default=[], metavar="LABEL=TASK", help="classification, counting or regression")
    add("--share", type=float, default=0.01, help="of the labels of each class, for lowshot and finetune")
    add(
        "--finetune",
        choices=TUNINGS,
        default="paper",
        help="paper: 50 epochs, batch 512, rate 3e-5; small: for few images",
    )
    add("--finetune-epochs", type=int)
    add("--finetune-rate", type=float)
    add("--finetune-batch", type=int)
    add("--images", type=int, help="of each set, drawn at random; all by default")
    add("--image-size", type=int, help="side of the images, pixels; positions are resampled")
    add(
        "--resize",
        type=int,
        help="shorter side before the central crop, pixels; the crop by default (usual: 256 for 224)",
    )
    add("--batch-size", type=int, default=256, help="images encoded at once")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the features; auto: bf16 on a GPU")
    add("--attention-heads", type=int, help="of a .pth.tar whose width is none of the published ones")
    add("--cache", help="a folder to keep the indices of the images in")
    add("--out", help="JSON file for the results")
    return p


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print the table, write the JSON. Returns the exit status; what a user can mend ends in one sentence."""
    p = parser()
    options = p.parse_args(argv)
    if options.seeds < 1:
        p.error(f"--seeds: expected at least 1, got {options.seeds}")
    if wrong := [item for item in options.task if "=" not in item]:
        p.error(f"--task: expected LABEL=TASK, for example count=counting, got {wrong[0]}")
    try:
        results = probe(options)
        if options.out:
            Path(options.out).write_text(json.dumps(results, indent=2) + "\n")
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(results["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
