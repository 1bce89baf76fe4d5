"""One run of a comparison: trained by the trainer's own command, probed at its checkpoints, kept as a record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.compare.images import Images
from bench.compare.presets import Preset, settings
from bench.compare.runs import TEACHER, Run, find, has_teacher
from ijepa_fast import configs
from ijepa_fast.config import Config, ConfigError, flatten, load_config
from ijepa_fast.engine.engine import choose_device
from ijepa_fast.eval.evaluate import Options, evaluate
from ijepa_fast.eval.features import Encode
from ijepa_fast.eval.figures import Figure, against
from ijepa_fast.eval.labels import Labelled
from ijepa_fast.eval.tokens import main as fit_tokenizer
from ijepa_fast.files import publish
from ijepa_fast.interop.load import load
from ijepa_fast.report.plots import read_log
from ijepa_fast.report.summary import train_seconds
from ijepa_fast.run.build import build_draw, build_method, make_ready
from ijepa_fast.run.provenance import FORMAT, provenance
from ijepa_fast.run.sources import evaluation, untrained

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what says which job a process is of
ROOT = Path(__file__).resolve().parents[2]
BATCHES = 20  # whose work is averaged
ENDS = ("blocks", "attentive", "lowshot")  # probes of a run's first and last encoder alone, beside linear and k-NN
LOW, DRAWS = 0.01, 3  # share of the labels of low-shot learning, and how often it is drawn
LOW_SHOT = "1 % low-shot"  # that probe's name


@dataclass(frozen=True)
class Job:
    """What is needed to do the run `name` with `seed`.

    extra: what the command line changes. ends: of ENDS. held: heads are tested on training images that they were not
    fitted to, not on test images. teachers: the folder with the run that is its frozen teacher; None: `out`.
    """

    name: str
    seed: int
    preset: Preset
    images: Images
    out: Path
    extra: list[str] = field(default_factory=list)
    ends: tuple[str, ...] = ENDS
    held: bool = False
    teachers: Path | None = None

    @property
    def run(self) -> Run:
        """What the name stands for."""
        found = find(self.name)
        assert found is not None
        return found

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.out / f"{self.name}-{self.seed}"

    @property
    def teacher(self) -> str | None:
        """The name of the run that is its frozen teacher, on the same images; None: it has none."""
        if not has_teacher(self.name):
            return None
        return TEACHER + (f"@{self.run.images}" if self.run.images else "")

    @property
    def teacher_folder(self) -> Path:
        """Of that run, of the same seed."""
        return (self.teachers or self.out) / f"{self.teacher}-{self.seed}"

    @property
    def ready(self) -> bool:
        """Whether it needs none, or that run is done."""
        return self.teacher is None or (self.teacher_folder / "weights.safetensors").is_file()

    @property
    def no_teacher(self) -> str:
        """What to say where it is not."""
        return (
            f"{self.name}: its teacher is the run {self.teacher} of the same seed, not found in {self.teacher_folder}; "
            f"name {self.teacher} before it"
        )

    def settings(self) -> list[str]:
        """What is changed in its config, but for paths. Raises ValueError for what cannot be."""
        base, count = self.images.config(self.run), self.images.count(self.run)
        return [
            f"seed={self.seed}",
            *settings(self.name, self.preset, count, base, self.images.overrides, self.extra),
        ]


def done(job: Job, changed: list[str]) -> dict[str, Any] | None:
    """The record of a run that is finished, None of another. Raises ConfigError where it is of other settings."""
    kept = job.folder / "learning.json"
    if not kept.is_file():
        return None
    record = json.loads(kept.read_text())
    expected = {"settings": changed, "config_digest": digest(job), "ends": list(job.ends), "version": FORMAT}
    if record.items() >= expected.items():
        return record
    raise ConfigError(f"{job.folder} holds a run with other settings or of an earlier version; give another --out")


def do(job: Job) -> dict[str, Any]:
    """Train and probe a run -> its record, also kept in its folder. What was finished before is read from there."""
    changed = job.settings()
    if (record := done(job, changed)) is not None:
        return record
    if not job.ready:
        raise ConfigError(job.no_teacher)
    source, train, test = job.images.of(job.run)
    paths = [f"data.source={source}", f"probe.train={train}", f"probe.test={test}"]
    overrides = [*paths, f"runs={job.out}", f"name={job.folder.name}", *changed]
    path = configs.find(job.images.config(job.run))
    if job.teacher:
        overrides.append(f"objective.options.teacher_from={job.teacher_folder / 'weights.safetensors'}")
    overrides += tokens(load_config(path, overrides), source, job.images.out)
    config = load_config(path, overrides)
    command = [sys.executable, str(ROOT / "ijepa_fast" / "train.py"), "--config", str(path), *overrides]
    print(f"{job.name}, seed {job.seed}", file=sys.stderr, flush=True)
    # The run is a job of its own, even where this process has one.
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise RuntimeError(
            f"{job.name}, seed {job.seed}: the trainer failed, see above; the same command goes on from there"
        )
    record = record_of(job, config, changed, (str(train), str(test)))
    checkpoints = sorted((job.folder / "checkpoints").glob("step-*"))
    shutil.copy(checkpoints[-1] / "weights.safetensors", job.folder)  # what a run with a teacher reads
    with publish(job.folder / "learning.json") as draft:  # last: with it the run is done
        draft.write_text(json.dumps(record, indent=1))
    shutil.rmtree(job.folder / "checkpoints")
    return record


def digest(job: Job) -> str:
    """Of what the run's config says before anything is changed in it."""
    says = json.dumps(flatten(load_config(configs.find(job.images.config(job.run)))), sort_keys=True, default=str)
    return hashlib.sha256(says.encode()).hexdigest()[:12]


def record_of(job: Job, config: Config, changed: list[str], folders: tuple[str, str]) -> dict[str, Any]:
    """Probe what the trainer left; what is kept of the run."""
    device = choose_device(config.engine.device)
    log, work = read_log(job.folder / "log.jsonl"), work_per_image(config)
    train, test, options = evaluation(config, folders, device)
    if job.held:
        train, test = halves(train, job.preset.images)
    checkpoints = {int(p.name.removeprefix("step-")): p for p in sorted((job.folder / "checkpoints").glob("step-*"))}
    last = max(checkpoints)
    found = {0: probed(untrained(config, device), train, test, options, job.ends)}
    for step, path in checkpoints.items():
        ends = job.ends if step == last else ()
        found[step] = probed(load(path, device=device), train, test, options, ends)
    points = [
        {
            "step": step,
            "petaflop": step * job.preset.batch * work / 1e6,
            "seconds": train_seconds(log, step, job.preset.batch),
            "figures": [figure.to_json() for figure in against(figures, found[0])],
        }
        for step, figures in found.items()
    ]
    losses = [record["loss"] for record in log if "loss" in record]
    return provenance(device) | {
        "run": job.name,
        "seed": job.seed,
        "config": f"{job.images.config(job.run)}.yaml",
        "config_digest": digest(job),
        "settings": changed,
        "ends": list(job.ends),
        "lr": config.optim.lr,
        "teacher": teacher_of(job),
        "gflop_per_image": work,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "points": points,
    }


def teacher_of(job: Job) -> dict[str, Any] | None:
    """What the run's frozen teacher had cost when it was done."""
    if job.teacher is None:
        return None
    point = json.loads((job.teacher_folder / "learning.json").read_text())["points"][-1]
    return {"run": job.teacher} | {key: point[key] for key in ("step", "petaflop", "seconds")}


def probed(encoder: Encode, train: Labelled, test: Labelled, options: Options, ends: tuple[str, ...]) -> list[Figure]:
    """Figures of an encoder: linear and k-NN, and of each probe in `ends`."""
    features = ("last", "blocks") if "blocks" in ends else ("last",)
    figures = evaluate(encoder, train, test, replace(options, features=features))
    if "attentive" in ends:
        figures += evaluate(encoder, train, test, replace(options, probes=("attentive",)))
    if "lowshot" in ends:  # a share of all the labels, of which some are read
        share = min(1.0, LOW * len(train.source) / min(len(train.source), options.images or len(train.source)))
        low = replace(options, probes=("lowshot",), share=share, seeds=DRAWS)
        figures += [replace(figure, probe=LOW_SHOT) for figure in evaluate(encoder, train, test, low)]
    return figures


def halves(labelled: Labelled, images: int) -> tuple[Labelled, Labelled]:
    """Two parts of labelled images that share none, of at most `images` each, always the same."""
    rows = np.random.default_rng(0).permutation(len(labelled.source))[: 2 * images]
    parts = np.array_split(rows, 2)
    return labelled.take(np.sort(parts[0])), labelled.take(np.sort(parts[1]))


def work_per_image(config: Config) -> float:
    """GFLOP of a training step of `config` per image, as executed here, from what its first batches draw."""
    method = build_method(config)
    make_ready(method)  # a frozen teacher's work is counted, too
    draw = build_draw(config, method, torch.device("cpu"), 0, 1)
    return sum(method.work(draw(step)).total for step in range(BATCHES)) / BATCHES / config.batch_size / 1e9


def tokens(config: Config, train: Path, out: Path) -> list[str]:
    """The key that gives `config` its tokenizer, fitted to the images of `train` where it is not in `out`; or none."""
    method = build_method(config)
    if not hasattr(method.options, "tokenizer"):
        return []
    patch, count = method.options.token_patch, method.options.vocabulary
    size = max(method.setup.grid) * patch
    path = out / f"tokens-{count}-of-{patch}.safetensors"
    if not path.is_file():
        options = ["--source", str(train), "--patch", str(patch), "--size", str(size), "--vocabulary", str(count)]
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            failed = fit_tokenizer([*options, "--out", str(path)])
        if failed:
            raise RuntimeError("no tokenizer could be fitted, see above")
    return [f"objective.options.tokenizer={path}"]
