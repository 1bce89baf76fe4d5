"""Whether a decoder shows what it is told, or only its own habit: checks with controls, on images kept from training.

Shapes: n images, M target blocks of each, k noises, h x w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.visualise.conditions import Conditions
from ijepa_fast.visualise.decoder import Decoder
from ijepa_fast.visualise.training import as_signed

TIMES = (300, 700)  # of the denoising loss: before, features are of little use; behind, images are gone
DRAWN = 2  # times of each image
SHOWN, NOISES = 16, 4  # images that are sampled, and samples of each
AT_ONCE = 64  # images in a pass of the decoder
Mean = tuple[float, float]  # and its standard error


@dataclass(frozen=True)
class Samples:
    """Samples fp32 (n, k, 3, h, w) in 0..1 of the first n held-out images and the same k noises.

    own: of a block of each. moved: of the block `other` of the same image, which has the same context; None where
    images have one block. untrained: of the first block, by a predictor before training; None where that is what the
    decoder was trained on. blocks, others: int64 (n,), which.
    """

    blocks: torch.Tensor
    others: torch.Tensor
    own: torch.Tensor
    moved: torch.Tensor | None
    untrained: torch.Tensor | None


def controls(conditions: Conditions, kind: str, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a decoder of `kind` may be told of `blocks` int64 (n,) of the first n images, fp32 (n, D) each.

    "right"; "shuffled", that of the next image; "moved", that of another block of the same image, where there is one;
    "untrained", by a predictor before training.
    """
    rows = torch.arange(len(blocks))
    told = conditions.told(kind)
    others = conditions.other_block()[rows, blocks]
    right = told[rows, blocks]
    found = {"right": right, "shuffled": right.roll(1, 0)}
    if conditions.blocks.shape[1] > 1:
        found["moved"] = told[rows, others]
    if kind != "untrained":
        found["untrained"] = conditions.told("untrained")[rows, blocks]
    return found


@torch.no_grad()
def denoising(decoder: Decoder, conditions: Conditions, kind: str, seed: int) -> dict[str, list[Mean]]:
    """The loss of the noise at TIMES, on all held-out images, by what the decoder is told: "right", "shuffled",
    "moved", "untrained" (see `controls`) and "nothing"; and each control less "right", "shuffled - right" say.

    Times, noises and blocks are drawn by `seed` and the same for all. Each is [(mean, its standard error over images)]
    of the whole image, and of its pixels inside and outside the block.
    """
    rng = np.random.default_rng((seed, 1))
    count, device = conditions.held, decoder.alphas.device
    rows = torch.arange(count)
    blocks = torch.from_numpy(rng.integers(conditions.blocks.shape[1], size=count))
    times = torch.from_numpy(rng.integers(*TIMES, size=(DRAWN, count))).to(device)
    images = as_signed(conditions.images[:count])
    noise = torch.from_numpy(rng.standard_normal((DRAWN, *images.shape), np.float32)).to(device)
    masks = conditions.pixels(conditions.blocks[rows, blocks])
    told = controls(conditions, kind, blocks)
    losses: dict[str, torch.Tensor] = {}
    for name, features in {**told, "nothing": told["right"]}.items():
        keep = torch.full((count,), name != "nothing", device=device)
        found = torch.zeros(count, *images.shape[2:])
        for draw in range(DRAWN):
            for part in rows.split(AT_ONCE):
                errors = decoder.errors(
                    images[part].to(device), noise[draw, part], times[draw, part], features[part].to(device), keep[part]
                )[1]
                found[part] += errors.mean(1).cpu() / DRAWN
        losses[name] = _by_place(found, masks)
    differences = {f"{name} - right": loss - losses["right"] for name, loss in losses.items() if name != "right"}
    return {name: _told(values) for name, values in (losses | differences).items()}


def samples_of(decoder: Decoder, conditions: Conditions, kind: str, seed: int, steps: int, guidance: float) -> Samples:
    """Samples of the first SHOWN held-out images, each with the same NOISES noises, which are drawn by `seed`."""
    count, device = min(SHOWN, conditions.held), decoder.alphas.device
    blocks = torch.arange(count) % conditions.blocks.shape[1]
    others = conditions.other_block()[torch.arange(count), blocks]
    features = controls(conditions, kind, blocks)
    noise = torch.from_numpy(
        np.random.default_rng((seed, 2)).standard_normal((NOISES, 3, *conditions.images.shape[1:3]), np.float32)
    )

    def draw(features: torch.Tensor) -> torch.Tensor:
        pairs = features.repeat_interleave(NOISES, 0), noise.repeat(count, 1, 1, 1)
        parts = zip(*(tensor.to(device).split(AT_ONCE) for tensor in pairs))
        drawn = torch.cat([decoder.sample(told, noises, steps, guidance).cpu() for told, noises in parts])
        return drawn.unflatten(0, (count, NOISES))

    drawn = {name: draw(of) for name, of in features.items() if name != "shuffled"}
    return Samples(blocks, others, drawn["right"], drawn.get("moved"), drawn.get("untrained"))


def variances(conditions: Conditions, samples: Samples) -> dict[str, list[Mean]]:
    """Variances of pixels, in units of their range squared: {name: [(mean, its standard
    error over images)] of the whole image, and of its pixels inside and outside the block}.

    "other noise": of samples of one feature. "other image": of samples of one noise. "moved": half the mean square of
    what changes where the block of the same context moves and the noise stays, which is a variance of two; outside is
    outside of both blocks. "untrained, other noise", "untrained, other image": those by a predictor before training.
    """
    rows = torch.arange(len(samples.own))
    masks = conditions.pixels(conditions.blocks[rows, samples.blocks])
    found = {
        "other noise": _told(_by_place(_of_noise(samples.own), masks)),
        "other image": _told(_by_place(_of_image(samples.own), masks)),
    }
    if samples.moved is not None:
        both = masks | conditions.pixels(conditions.blocks[rows, samples.others])
        found["moved"] = _told(_by_place((samples.own - samples.moved).square().mean((1, 2)) / 2, both))
    if samples.untrained is not None:
        found["untrained, other noise"] = _told(_by_place(_of_noise(samples.untrained), masks))
        found["untrained, other image"] = _told(_by_place(_of_image(samples.untrained), masks))
    return found


def _of_noise(samples: torch.Tensor) -> torch.Tensor:
    """(n, k, 3, h, w) -> the variance over noises, mean over colours (n, h, w)."""
    return samples.var(1).mean(1)


def _of_image(samples: torch.Tensor) -> torch.Tensor:
    """(n, k, 3, h, w) -> each image's share of the variance over images, mean over noises and colours (n, h, w)."""
    count = len(samples)
    return (samples - samples.mean(0)).square().mean((1, 2)) * count / (count - 1)


def _by_place(values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Values (n, h, w) and masks bool (n, h, w) -> means of each image (n, 3): everywhere, inside, outside.

    NaN where there is no pixel.
    """
    inside = masks.float()
    parts = [torch.ones_like(inside), inside, 1 - inside]
    return torch.stack([(values * part).sum((1, 2)) / part.sum((1, 2)) for part in parts], 1)


def _told(values: torch.Tensor) -> list[Mean]:
    """Values of images (n, 3) -> mean and standard error of each place, over the images that have it."""
    found = []
    for column in values.double().T:
        known = column[~column.isnan()]
        error = known.std() / len(known) ** 0.5 if len(known) > 1 else torch.tensor(float("nan"))
        found.append((float(known.mean()), float(error)))
    return found
