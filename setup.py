"""Packages of ijepa_fast: the op folders under kernels/ are installed as ijepa_fast.kernels.<op>, the YAML files of
configs/ in ijepa_fast/configs/.

The extension ijepa_fast._C (csrc/) is optional. It is built when torch can be imported, or lies in the environment that
pip installs into, and a compiler is there; IJEPA_FAST_NO_EXT=1 leaves it out. Its CUDA part needs a CUDA build of torch
and nvcc.
"""

import glob
import importlib.util
import os
import shutil
import sys
import sysconfig

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

OPS = find_packages("kernels")
CUDA_TARGETS = ("80", "90a", "100")


def extensions():
    """The extension, or nothing where it cannot be built."""
    if os.environ.get("IJEPA_FAST_NO_EXT") == "1":
        return []
    # pip hides the environment's packages while it builds; what is built against another torch would not load.
    if importlib.util.find_spec("torch") is None:
        sys.path.append(sysconfig.get_paths()["platlib"])
    try:
        from torch.utils import cpp_extension
    except ImportError:
        print("ijepa_fast: torch is not installed here, so the extension ijepa_fast._C is not built")
        return []
    return [
        Extension(
            "ijepa_fast._C",
            sources=sorted(glob.glob("csrc/*.cpp")),
            depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*.cu")),
            include_dirs=cpp_extension.include_paths(),
            library_dirs=cpp_extension.library_paths(),
            libraries=["c10", "torch_cpu", "torch"],
            language="c++",
            # -fopenmp is not given to the linker: the symbols then come from the OpenMP library torch has loaded, so
            # there is one pool of threads, not two.
            extra_compile_args=["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-g0"],
            optional=True,
        )
    ]


class BuildExtension(build_ext):
    """Compiles the CUDA file too, where there is something to compile it with and for."""

    def build_extension(self, ext):
        import torch

        if torch.version.cuda and (nvcc := shutil.which("nvcc")):
            os.makedirs(self.build_temp, exist_ok=True)
            object_file = os.path.join(self.build_temp, "adamw_ema_cuda.o")
            targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in CUDA_TARGETS]
            options = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", *targets]
            self.spawn([nvcc, *options, "-c", "csrc/adamw_ema_cuda.cu", "-o", object_file])
            ext.extra_objects.append(object_file)
            ext.define_macros.append(("IJEPA_FAST_CUDA", None))
            ext.library_dirs.append(os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))), "lib64"))
            ext.libraries.extend(["cudart_static", "rt", "dl", "pthread"])
        super().build_extension(ext)


FOLDERS = {f"ijepa_fast.kernels.{op}": "kernels/" + op.replace(".", "/") for op in OPS}
FOLDERS["ijepa_fast.configs"] = "configs"  # data only: the module ijepa_fast/configs.py finds them there

setup(
    packages=[*find_packages(include=["ijepa_fast", "ijepa_fast.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "ijepa_fast": ["py.typed"],
        "ijepa_fast.configs": ["*.yaml"],
        "ijepa_fast.report": ["page.css", "page.js"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
