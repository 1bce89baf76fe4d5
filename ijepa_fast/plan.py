"""`ijepa-fast plan`: what a run will need, before anything runs."""

from __future__ import annotations

import sys

from ijepa_fast.command import one_sentence
from ijepa_fast.config import load_config
from ijepa_fast.front import parser


@one_sentence()
def main(argv: list[str] | None = None) -> int:
    """Print the plan. Returns the exit status."""
    p = parser("plan", "Memory, work and hours of a run, before anything runs.")
    p.add_argument("--gpu", default="H200", help="the GPU its hours are for")
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8], help="numbers of ranks")
    p.add_argument("--images", type=int, help="images of an epoch; default ImageNet-1k's number")
    args = p.parse(argv)
    config = load_config(args.config, args.overrides)
    from ijepa_fast.run import forecast

    print(forecast.report(config, forecast.make(config, args.images, args.gpu, tuple(args.ranks)), args.gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
