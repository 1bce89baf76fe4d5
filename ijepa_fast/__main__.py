"""`ijepa-fast COMMAND ...`, or `python -m ijepa_fast COMMAND ...`: dispatch only; each command has its own --help."""

from __future__ import annotations

import importlib
import os
import signal
import sys

from ijepa_fast.spelling import close

COMMANDS = {
    "train": ("ijepa_fast.front", "train on a folder of images"),
    "plan": ("ijepa_fast.plan", "memory, work and hours of a run, before anything runs"),
    "probe": ("ijepa_fast.probe", "evaluate frozen features on labelled images"),
    "compare": ("ijepa_fast.compare", "evaluate several encoders on the same images, in one table"),
    "embed": ("ijepa_fast.api", "turn images into vectors"),
    "export": ("ijepa_fast.interop.export", "write the weights for Hugging Face, timm or the published code"),
    "visualise": ("ijepa_fast.visualise", "draw what a predictor predicts, by a decoder"),
    "report": ("ijepa_fast.report", "make one HTML page of a run, or of several compared"),
    "check-data": ("ijepa_fast.data.check", "find the images that cannot be decoded"),
    "stats": ("ijepa_fast.data.stats", "measure mean and std of images, and print the lines for them"),
    "tokenizer": ("ijepa_fast.eval.tokens", "fit a tokenizer of patches, for methods that predict tokens"),
    "configs": ("ijepa_fast.configs", "list the ready configurations, or print one"),
    "doctor": ("ijepa_fast.doctor", "say what this machine has, and try it"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command named first; its exit status, 2 for a command there is not."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        try:
            return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0
        except BrokenPipeError:  # `ijepa-fast configs | head`: whoever read has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
    if argv == ["--version"]:
        from ijepa_fast import __version__

        print(f"ijepa_fast {__version__}")
        return 0
    asked = argv in (["-h"], ["--help"])
    out = sys.stdout if asked else sys.stderr
    if argv and not asked:
        near = close(argv[0].lower(), COMMANDS)
        print(f"error: there is no command {argv[0]}" + (f"; did you mean {near}?" if near else "") + "\n", file=out)
    print("usage: ijepa-fast COMMAND ...\n", file=out)
    for name, (_, help_text) in COMMANDS.items():
        print(f"  {name:<11} {help_text}", file=out)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
