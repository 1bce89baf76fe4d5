"""The fused operations: each is a package `ijepa_fast.kernels.<op>`, whose source folder is `kernels/<op>`.

An installed wheel carries the op folders inside this package. In a checkout they stand beside `setup.py`, so their
parent folder is appended to this package's search path; the checkout's `kernels/` itself must never be a package, since
that import name belongs to another project.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "setup.py").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout / "kernels"))

from ijepa_fast.kernels.common.dispatch import choice, use  # noqa: E402  (needs the search path above)

__all__ = ["choice", "use"]
