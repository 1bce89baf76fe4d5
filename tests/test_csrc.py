"""csrc compiles where this machine's build of torch does not use it: the CUDA kernel, and the binding's CUDA half."""

import re
import shutil
import subprocess
import sysconfig

import pytest
from torch.utils import cpp_extension

from tests.launch import ROOT


def compile_with(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_the_kernel_for_hopper(tmp_path):
    """For fp32 and bf16 gradients, without a spilled register, and the table of tensors fits a launch's parameters."""
    target = ("-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-Werror=all-warnings", "-O3", "-std=c++20")
    report = compile_with("nvcc", *target, "-c", "csrc/adamw_ema_cuda.cu", "-o", str(tmp_path / "kernel.o"))
    assert len(re.findall("Compiling entry function", report)) == 2
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")] * 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_binding_compiles_with_its_cuda_half():
    """It needs no CUDA headers, so a machine without CUDA can tell whether it still compiles."""
    paths = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    compile_with("c++", "-std=c++20", "-fsyntax-only", "-DIJEPA_FAST_CUDA", *paths, "csrc/adamw_ema.cpp")
