"""Packages of ijepa_fast: the op folders under kernels/ are installed as ijepa_fast.kernels.<op>."""

from setuptools import find_packages, setup

OPS = find_packages("kernels")

setup(
    packages=[*find_packages(include=["ijepa_fast", "ijepa_fast.*"]), *(f"ijepa_fast.kernels.{op}" for op in OPS)],
    package_dir={f"ijepa_fast.kernels.{op}": "kernels/" + op.replace(".", "/") for op in OPS},
)
