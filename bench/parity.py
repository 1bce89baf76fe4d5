"""How far this project's numbers are from the published codes': tests/parity.py on every archive, as one file.

python bench/parity.py             # writes bench/results/parity.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.run import RESULTS, ROOT, about
from tests.parity import TOLERANCE, parity


def main() -> int:
    """Compare, write; 1 where an error is over the tolerance."""
    archives = {}
    for path in sorted((ROOT / "tests" / "data").glob("*_step.npz")):
        errors = parity(path)
        worst = max(errors, key=lambda name: errors[name])
        archives[path.stem] = {"quantities": len(errors), "largest": errors[worst], "of": worst}
        print(f"{path.stem}: {len(errors)} quantities, {errors[worst]:.1e} ({worst})", flush=True)
    result = about(torch.device("cpu"), "fp32") | {"tolerance": TOLERANCE, "archives": archives}
    (RESULTS / "parity.json").write_text(json.dumps(result, indent=1) + "\n")
    return max(found["largest"] for found in archives.values()) >= TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
