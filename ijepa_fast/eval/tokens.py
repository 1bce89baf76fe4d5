"""The command `tokenizer`: k-means on patches of a folder's images (models/tokenizer.py)."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ijepa_fast.command import one_sentence, whole
from ijepa_fast.data.central import eval_batches
from ijepa_fast.data.sources import Source, open_source
from ijepa_fast.eval.labels import Samples
from ijepa_fast.models.tokenizer import fit_patches, normalised_patches, save_patches


def sample_patches(source: Source, size: int, patch: int, images: int, patches: int, seed: int) -> torch.Tensor:
    """Normalised patches (R, W), at most `patches`, of at most `images` of `source`, resized to `size` pixels."""
    order = np.random.default_rng(seed).permutation(len(source))[:images]
    each = max(1, -(-patches // len(order)))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch, _ in eval_batches(Samples(source, order), batch_size=64, crop=size, resize=size, max_bad_share=1.0):
        found = normalised_patches(batch, patch).unflatten(0, (len(batch), -1))
        places = torch.rand(found.shape[:2], generator=generator).argsort(1)[:, :each]
        rows.append(found.gather(1, places[..., None].expand(-1, -1, found.shape[2])).flatten(0, 1))
    return torch.cat(rows)[:patches]


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(
        prog="ijepa-fast tokenizer",
        description="Fit k-means to patches of your images: a tokenizer of this project's own, no published one.",
    )
    parser.add_argument("--source", required=True, help="a folder, tar files or a list, as data.source")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="not there yet")
    parser.add_argument("--patch", type=whole(), default=8, help="pixels of a patch: objective.options.token_patch")
    parser.add_argument("--vocabulary", type=whole(), default=8192, help="tokens: objective.options.vocabulary")
    parser.add_argument("--size", type=whole(), default=112, help="pixels that images are resized to")
    parser.add_argument("--images", type=whole(), default=10_000, help="images that are looked at, at most")
    parser.add_argument("--patches", type=whole(), default=400_000, help="patches that are drawn of them, at most")
    parser.add_argument("--rounds", type=whole(), default=20, help="of k-means")
    parser.add_argument("--seed", type=whole(0), default=0)
    args = parser.parse_args(argv)
    for name in ("patch", "vocabulary", "size", "images", "patches", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.size % args.patch:
        raise ValueError(f"--size: expected a multiple of --patch={args.patch}, got {args.size}")
    if Path(args.out).suffix != ".safetensors" or Path(args.out).exists():
        raise ValueError(f"--out: expected a name that ends in .safetensors and is not there yet, got {args.out}")
    source = open_source(args.source)
    rows = sample_patches(source, args.size, args.patch, args.images, args.patches, args.seed)
    centres = fit_patches(rows, args.vocabulary, args.rounds, args.seed)
    save_patches(args.out, centres, args.patch)
    print(f"{args.out}: {len(centres)} centres of {len(rows)} patches of {args.patch} pixels")
    return 0
