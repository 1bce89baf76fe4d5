"""Write the weights of a run for other tools.

    python -m ijepa_fast export --checkpoint RUN_OR_FILE --format hf|timm|reference|safetensors --out PATH

hf           a folder for transformers' AutoModel and AutoImageProcessor, with the mean and std of the training
timm         a folder for timm.create_model("local-dir:PATH", pretrained=True)
reference    a .pth.tar with the published code's keys
safetensors  one file for ijepa_fast.load and for the configuration's `init`

The first two hold one encoder, the average where there is one unless --network says otherwise; the others all networks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ijepa_fast.command import one_sentence, whole
from ijepa_fast.files import publish
from ijepa_fast.interop.huggingface import save_hf
from ijepa_fast.interop.load import read
from ijepa_fast.interop.reference import save_reference
from ijepa_fast.interop.timm import save_timm
from ijepa_fast.interop.weights import Weights, save_weights, with_image_size

ONE_ENCODER = {"hf": save_hf, "timm": save_timm}
ALL_NETWORKS = {"reference": save_reference, "safetensors": save_weights}


def export(weights: Weights, form: str, out: str | Path, network: str | None = None) -> None:
    """Write `weights` to `out` in the format `form`: complete, or not at all.

    network: of the formats with one encoder, "target_encoder" (default) or "encoder". ValueError where `out` exists.
    """
    out = Path(out)
    if network and form not in ONE_ENCODER:
        one = " or ".join(ONE_ENCODER)
        raise ValueError(f"--network: {form} holds all networks; leave it out, or take --format {one}")
    if form == "safetensors" and out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name that ends in .safetensors, by which it is known, got {out.name!r}")
    with publish(out, lock=True) as draft:
        if out.exists():
            raise ValueError(f"--out: {out} exists already; choose another path, or remove it")
        if form in ONE_ENCODER:
            ONE_ENCODER[form](draft, weights.network(network), weights.arch)
        else:
            ALL_NETWORKS[form](draft, weights)


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="ijepa-fast export", description="Write weights for other tools.")
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_FILE", help="whatever ijepa_fast.load takes")
    parser.add_argument("--format", required=True, choices=[*ONE_ENCODER, *ALL_NETWORKS])
    parser.add_argument("--out", required=True, metavar="PATH", help="folder (hf, timm) or file, not there yet")
    parser.add_argument("--network", choices=["encoder", "target_encoder"], help="default: the average, if any")
    parser.add_argument("--image-size", type=whole(), help="pixels; positions are resampled (default: the training's)")
    parser.add_argument("--heads", type=whole(), help="of a .pth.tar whose width is none of the published ones")
    args = parser.parse_args(argv)
    weights = read(args.checkpoint, args.heads)
    if args.image_size is not None:
        weights = with_image_size(weights, args.image_size)
    export(weights, args.format, args.out, args.network)
    written = args.network or weights.best if args.format in ONE_ENCODER else weights.held
    print(f"{args.out}: {written}")
    return 0
