"""Pictures of what an encoder sees: masks, nearest neighbours, PCA of patch features, as PNG and JPEG data URIs.

Shapes: n images, N patches, D features.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.sources import Source
from ijepa_fast.eval.features import Encode, Standardiser, pool
from ijepa_fast.eval.knn import nearest
from ijepa_fast.eval.labels import Samples
from ijepa_fast.interop.load import PretrainedEncoder
from ijepa_fast.masks.packing import MaskDraw
from ijepa_fast.report.plots import as_rgb, batch_masks, mask_views

NEIGHBOURS = 6
SHOWN = 8
BASIS = 64  # images whose patches the principal components are of
SIDE = 160  # pixels of a photograph on the page, at most


@dataclass
class Sample:
    """Images of a run and what its encoder makes of them.

    images uint8 (n, H, W, 3); pooled: features fp32 (n, D); patches: features fp32 (BASIS, N, D) of the first images;
    labels: n names, or n empty ones. before: as `pooled`, of the untrained encoder; None: there is none.
    """

    images: torch.Tensor
    pooled: torch.Tensor
    patches: torch.Tensor
    labels: list[str]
    before: torch.Tensor | None = None


@torch.no_grad()
def take_sample(
    source: Source,
    encoder: PretrainedEncoder,
    count: int,
    device: torch.device | str,
    seed: int = 0,
    untrained: Encode | None = None,
) -> Sample:
    """A Sample of `count` images of `source`, drawn by `seed`; the encoders are on `device`."""
    rows = np.random.default_rng(seed).permutation(len(source))[:count]
    interpolation = encoder.arch.interpolation
    options: dict[str, Any] = {"crop": encoder.crop, "resize": encoder.crop, "interpolation": interpolation}
    images, pooled, before, ids = [], [], [], []
    patches: list[torch.Tensor] = []
    for batch, found in eval_batches(Samples(source, rows), batch_size=32, device=device, **options):
        features = encoder(batch)
        if sum(map(len, patches)) < BASIS:
            patches.append(features.float().cpu())
        images.append(batch.cpu())
        pooled.append(pool(features).cpu())
        if untrained is not None:
            before.append(pool(untrained(batch)).cpu())
        ids += found.tolist()
    if len(ids) < 2:
        raise ValueError(f"expected at least 2 images that can be decoded in {source.root}, got {len(ids)}")
    names = [source.classes[source.labels[i]] for i in ids] if source.labels is not None else [""] * len(ids)
    first = torch.cat(before) if before else None
    return Sample(as_rgb(torch.cat(images)), torch.cat(pooled), torch.cat(patches), names, first)


def masks_gallery(images: torch.Tensor, packed: MaskDraw, patch: int) -> str:
    """The first images beside what the context encoder sees of each and the blocks to predict."""
    contexts, targets = batch_masks(packed)
    rows = []
    for i, image in enumerate(images[: min(SHOWN, packed.images)].numpy()):
        views = mask_views(image, contexts[i], targets[:, i], patch)
        rows.append(f'<div class="triple">{"".join(_image(view) for view in views)}</div>')
    return f'<div class="gallery pairs">{"".join(rows)}</div>'


def neighbours_gallery(sample: Sample) -> str:
    """Rows of an image and its nearest neighbours, with labels.

    Distance is the cosine of pooled features, standardised as for the probes.
    """
    features = Standardiser(sample.pooled)(sample.pooled)
    unit = torch.nn.functional.normalize(features, dim=1)
    count = min(SHOWN, len(features))
    rows = []
    for query, found in enumerate(nearest(features, torch.arange(count), NEIGHBOURS).tolist()):
        label = sample.labels[query]
        cells = [_labelled(sample.images[query], label, "query")]
        for other in found:
            kind = "same" if label and sample.labels[other] == label else ""
            text = f"{sample.labels[other]} {unit[query] @ unit[other]:.2f}"
            cells.append(_labelled(sample.images[other], text, kind))
        rows.append(f'<div class="neighbours">{"".join(cells)}</div>')
    return f'<div class="rows">{"".join(rows)}</div>'


def pca_colours(patches: torch.Tensor, shown: int = SHOWN) -> np.ndarray:
    """Colours fp32 (shown, N, 3) in 0..1 of the patches of the first images.

    They are the first three principal components among the patches of all images (n, N, D), each stretched between its
    2nd and 98th percentile. The mean over images is taken off at each place, or the colours would tell where a patch
    lies and not what it holds.
    """
    centred = (patches - patches.mean(0)).flatten(0, 1)
    _, vectors = torch.linalg.eigh(centred.T.double() @ centred.double())
    parts = (centred[: shown * patches.shape[1]] @ vectors[:, -3:].flip(1).float()).numpy()
    low, high = np.percentile(parts, (2, 98), axis=0)
    colours = ((parts - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colours.reshape(-1, patches.shape[1], 3)


def pca_gallery(sample: Sample, grid: tuple[int, int]) -> str:
    """The first images beside the colours of their patches; grid: (rows, columns) of patches."""
    pairs = []
    for image, colours in zip(sample.images, pca_colours(sample.patches)):
        picture = (255 * colours.reshape(*grid, 3)).round().astype(np.uint8)
        pairs.append(f'<div class="double">{_photo(image)}{_image(picture, "pixels")}</div>')
    return f'<div class="gallery">{"".join(pairs)}</div>'


def spectrum(features: torch.Tensor) -> np.ndarray:
    """Singular values of features (n, D) over the largest, largest first, fp64."""
    values = torch.linalg.svdvals(features.double()).numpy()
    return values / values[0]


def _labelled(image: torch.Tensor, text: str, kind: str) -> str:
    return f'<figure class="{kind}">{_photo(image)}<figcaption>{html.escape(text)}</figcaption></figure>'


def _photo(image: torch.Tensor) -> str:
    picture = Image.fromarray(np.asarray(image))
    if picture.width > SIDE:
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return tag(picture, "JPEG", "", quality=90)


def _image(array: np.ndarray, kind: str = "") -> str:
    return tag(Image.fromarray(array), "PNG", kind)


def tag(picture: Image.Image, form: str, kind: str, **options: Any) -> str:
    """An <img> that holds the picture, of `form` JPEG or PNG; kind: its class."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{kind}" alt="" src="data:image/{form.lower()};base64,{data}">'
