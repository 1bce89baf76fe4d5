"""What a decoder is told and what it has to draw: pooled features of target blocks, by the frozen networks of a run.

Shapes: N images of h x w pixels, M target blocks of an image, P patches, D width.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ijepa_fast.config import Config
from ijepa_fast.data import Size
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.sources import Source
from ijepa_fast.eval.features import Standardiser
from ijepa_fast.eval.labels import Samples
from ijepa_fast.files import publish
from ijepa_fast.interop.load import latest, read
from ijepa_fast.interop.weights import load_state
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.methods.method import Method
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.report.plots import as_rgb, batch_masks
from ijepa_fast.run.build import build_method

KINDS = ("prediction", "target", "untrained")
FEWEST = 16  # images
HELD_OUT = 256  # images, at most, and an eighth of all, that no decoder is trained on
ENCODED, TOLD = 128, 10  # images at once, and batches between two lines


@dataclass(frozen=True)
class Networks:
    """The frozen networks of a run: its method with the weights of `checkpoint`, and its predictor before training."""

    method: Method
    predictor: Predictor
    untrained: Predictor
    checkpoint: str


@dataclass(frozen=True)
class Conditions:
    """Images and what networks make of their target blocks; the first `held` images are kept from training.

    images: uint8 (N, h, w, 3). context: bool (N, P), the patches that the context encoder saw. blocks: bool (N, M, P).
    pooled: of each of KINDS fp32 (N, M, D): the mean over a block of the predictions, of the target encoder's features,
    and of the predictions of a predictor before training. grid: (rows, columns) of patches.
    """

    images: torch.Tensor
    context: torch.Tensor
    blocks: torch.Tensor
    pooled: dict[str, torch.Tensor]
    grid: tuple[int, int]
    held: int

    def told(self, kind: str) -> torch.Tensor:
        """`pooled` of a kind, (N, M, D), each feature standardised by the images that decoders are trained on."""
        known = self.pooled[kind]
        return Standardiser(known[self.held :].flatten(0, 1), eps=1e-10)(known)

    def pixels(self, patches: torch.Tensor) -> torch.Tensor:
        """A mask of patches bool (..., P) as one of pixels of `images`, bool (..., h, w)."""
        rows, columns = (
            torch.arange(pixels) * count // pixels for pixels, count in zip(self.images.shape[1:3], self.grid)
        )
        return patches.unflatten(-1, self.grid)[..., rows[:, None], columns]

    def other_block(self) -> torch.Tensor:
        """(N, M) int64: of each block the block of the same image whose centre is farthest from its own; with one block
        to an image, that one.
        """
        places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in self.grid)).view(-1, 2)
        centres = self.blocks.float() @ places / self.blocks.sum(-1, keepdim=True)
        return torch.cdist(centres, centres).argmax(-1)


def networks_of(run: Path, config: Config) -> Networks:
    """The networks in the newest checkpoint of a run. Raises ValueError for a method without a predictor, or no
    checkpoint.
    """
    method = build_method(config, foreign=False)
    predictor = method.trained.get("predictor")
    if not isinstance(predictor, Predictor):
        raise ValueError(
            f"{run}: objective.method={config.objective.method} has no predictor of target blocks, whose "
            f"predictions are what visualise shows"
        )
    untrained = copy.deepcopy(predictor)
    weights = read(run)
    load_state(method.encoder, weights.network("encoder"), "encoder")
    load_state(predictor, weights.network("predictor"), "predictor")
    if method.probed is not method.encoder:
        load_state(method.probed, weights.network("target_encoder"), "target_encoder")
    for network in (*method.networks.values(), untrained):
        network.requires_grad_(False).eval()
    newest = latest(run)
    return Networks(method, predictor, untrained, newest.name if newest else "")


def size_of_pictures(crop: Size, side: int) -> tuple[Size, int]:
    """Height and width of the images that a decoder draws, `side` pixels the shorter one, and the side of the squares
    that it folds into channels, so that it works on about 16 x 16 of them.
    """
    shorter = min(crop)
    side = min(side, shorter)
    fold = max(1, round(side / 16))
    unit = 2 * fold
    height, width = (max(unit, round(side * length / shorter / unit) * unit) for length in crop)
    return (height, width), fold


@torch.no_grad()
def conditions_of(
    config: Config, networks: Networks, source: Source, count: int, size: Size, device: torch.device
) -> Conditions:
    """Conditions of at most `count` images of `source`, drawn by the run's seed, in `size`, with masks as the run's.

    Raises ValueError for fewer than FEWEST images.
    """
    rows = np.random.default_rng(config.seed).permutation(len(source))[:count]
    if len(rows) < FEWEST:
        raise ValueError(f"{source.root}: expected at least {FEWEST} images to train a decoder on, got {len(rows)}")
    data, predictors = config.data, {"prediction": networks.predictor, "untrained": networks.untrained}
    options: dict[str, Any] = {"crop": data.size, "resize": data.size, "interpolation": data.interpolation}
    for network in (*networks.method.networks.values(), networks.untrained):
        network.to(device)
    parts: dict[str, list[torch.Tensor]] = {}
    batches = eval_batches(Samples(source, rows), batch_size=ENCODED, device=device, **options)
    for number, (images, _) in enumerate(batches):
        draw = networks.method.draw(len(images), config.seed, number)
        if not isinstance(draw, MaskDraw):
            raise ValueError(f"objective.method={config.objective.method}: expected a method that draws target blocks")
        found = _batch(networks.method, predictors, images, replace(draw, channels=None, directions=None))
        for name, part in {"images": _shrunk(images, size), **found}.items():
            parts.setdefault(name, []).append(part.cpu())
        if number % TOLD == 0:
            print(f"encoded {min((number + 1) * ENCODED, len(rows))} of {len(rows)} images", file=sys.stderr)
    whole = {name: torch.cat(part) for name, part in parts.items()}
    if (left := len(whole["images"])) < FEWEST:
        raise ValueError(f"{source.root}: expected at least {FEWEST} images that can be decoded, got {left}")
    pooled = {kind: whole[kind] for kind in KINDS}
    held = min(HELD_OUT, left // 8)
    return Conditions(
        as_rgb(whole["images"]), whole["context"], whole["blocks"], pooled, networks.method.setup.grid, held
    )


def _batch(
    method: Method, predictors: dict[str, Predictor], images: torch.Tensor, draw: MaskDraw
) -> dict[str, torch.Tensor]:
    """Of B images their masks and what is pooled, (B, ...); of several contexts or mask sets the first."""
    count, contexts = len(images), draw.contexts
    context, targets = batch_masks(draw)
    seen = torch.zeros(count, draw.patches, dtype=torch.bool)
    for row, kept in enumerate(context):
        seen[row, torch.from_numpy(kept).long()] = True
    places = torch.from_numpy(targets[:, :count]).long()  # (M, B, K)
    blocks = torch.zeros(len(places), count, draw.patches, dtype=torch.bool).scatter_(2, places, True)
    found = {"context": seen, "blocks": blocks.transpose(0, 1)}
    draw = draw.to(images.device)
    patches = method.patchify(images)
    tokens = method.encoder.context(patches, draw)
    for kind, predictor in predictors.items():
        rows = predictor(tokens, draw.by_set).float()
        found[kind] = rows.view(len(places), contexts, -1, draw.target_size, rows.shape[1])[:, 0, :count].mean(2)
    features = method.probed(patches, count, "patches").float().view(count, draw.patches, -1)
    inside = blocks.to(images.device, torch.float32)
    found["target"] = torch.einsum("mbp,bpd->mbd", inside, features) / inside.sum(-1, keepdim=True)
    return found | {kind: found[kind].transpose(0, 1) for kind in KINDS}


def _shrunk(images: torch.Tensor, size: Size) -> torch.Tensor:
    """Images (B, H, W, C) resized, with at most three channels: RGB of eight bits as such, others as fp32."""
    plain = images.dtype == torch.uint8 and images.shape[3] == 3
    chosen = images[..., :3] if images.shape[3] >= 3 else images[..., :1]
    found = F.interpolate(chosen.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)
    found = found.permute(0, 2, 3, 1).contiguous()
    return found.round().clamp(0, 255).byte() if plain else found


def save(path: Path, conditions: Conditions, made: dict[str, Any]) -> None:
    """Write them with what they were `made` of."""
    values = {f.name: getattr(conditions, f.name) for f in fields(conditions)}
    with publish(path) as draft:
        torch.save({"made": made, **values}, draft)


def load(path: Path) -> tuple[Conditions, dict[str, Any]]:
    """What `save` wrote. Raises ValueError for a file that is none."""
    try:
        values = torch.load(path, weights_only=True)
        made = values.pop("made")
        return Conditions(**values), made
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}); remove {path.parent}") from None
