"""`python -m ijepa_fast COMMAND ...`: dispatch only; each command has its own --help."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": ("ijepa_fast.train", "train on a folder of images"),
    "probe": ("ijepa_fast.probe", "evaluate frozen features on labelled images"),
    "embed": ("ijepa_fast.api", "turn images into vectors"),
    "export": ("ijepa_fast.interop.export", "write the weights for Hugging Face, timm or the published code"),
    "report": ("ijepa_fast.report", "make one HTML page of a run"),
    "check-data": ("ijepa_fast.data.check", "find the images that cannot be decoded"),
    "stats": ("ijepa_fast.data.stats", "measure mean and std of images, and print the lines for them"),
}


def main(argv: list[str]) -> int:
    """Run the command named first; its exit status, 2 for a command there is not."""
    if not argv or argv[0] not in COMMANDS:
        print("usage: python -m ijepa_fast COMMAND ...\n", file=sys.stderr)
        for name, (_, help_text) in COMMANDS.items():
            print(f"  {name:<11} {help_text}", file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
