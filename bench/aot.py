"""Compile every Triton kernel ahead of time, at the shapes of the published models. Needs no GPU.

    python bench/aot.py [--op NAME] [--arch 80,90,100] [--csv FILE]

Prints, for every kernel and architecture, its registers, spilled bytes, shared memory (KiB), tensor memory (columns),
and the matrix instructions it uses: wgmma is Hopper's, tcgen05 Blackwell's, mma everybody's. The exit status is 1 when
a kernel does not compile, spills, needs more memory than a multiprocessor has, or has no case.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that one program may ask for.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns
MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}


@dataclass
class Compiled:
    """What came out for one case on one architecture; `error` is empty when all is well."""

    arch: int
    op: str
    kernel: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    tensor_memory: int = 0
    matrix: str = ""
    error: str = ""
    triton: str = ""  # version

    def line(self) -> str:
        """One line of the printed table."""
        figures = f"{self.registers:9}{self.spilled_bytes:9}{self.shared_bytes / 1024:8.1f}{self.tensor_memory:8}"
        return f"sm_{self.arch:<4} {self.kernel:58}{figures}  {self.matrix:8} {self.error}".rstrip()


def modules() -> list[str]:
    """Import names of the modules that hold kernels: each op's kernel.py, and what they share."""
    files = sorted((ROOT / "kernels").glob("*/kernel.py"))
    return [f"ijepa_fast.kernels.{file.parent.name}.kernel" for file in files] + [
        "ijepa_fast.kernels.common.column_sum"
    ]


def op_of(module: str) -> str:
    """The folder a module lies in."""
    return module.split(".")[2]


def uncovered(module: str) -> list[str]:
    """Names of the module's kernels that none of its cases compiles."""
    loaded = importlib.import_module(module)
    cases = [case for arch in ARCHITECTURES for case in loaded.aot_cases(arch // 10)]
    compiled = {case.kernel.__name__ for case in cases}
    kernels = {name for name, value in vars(loaded).items() if name.endswith("_kernel") and hasattr(value, "arg_names")}
    return sorted(kernels - compiled)


def compile_case(module: str, index: int, arch: int) -> Compiled:
    """Compile the `index`-th case of a module for `arch`; runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = importlib.import_module(module).aot_cases(arch // 10)[index]
    kernel, signature = case.kernel, case.signature()
    result = Compiled(arch, op_of(module), case.name, triton=triton.__version__)
    # As at a launch: tensors are aligned to 16 bytes; of numbers, those are whose type says so.
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        kernel,
        {n: signature[n].partition(":")[0] if n in signature else "constexpr" for n in kernel.arg_names},
        constexprs=case.constants,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.warps, "num_stages": case.stages}
        )
    except Exception as error:
        result.error = f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return result
    result.registers, result.spilled_bytes = resources(compiled.asm["cubin"])
    result.shared_bytes = compiled.metadata.shared
    result.tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    result.matrix = next((n for n, text in MATRIX_INSTRUCTIONS.items() if text in compiled.asm["ptx"]), "")
    result.error = verdict(result)
    return result


def verdict(result: Compiled) -> str:
    """What is wrong with a kernel that compiled, or nothing."""
    if result.spilled_bytes:
        return f"spills {result.spilled_bytes} bytes: give it a smaller tile or more warps"
    if result.shared_bytes > SHARED_LIMIT[result.arch]:
        return f"needs {result.shared_bytes} bytes of shared memory, there are {SHARED_LIMIT[result.arch]}"
    if result.tensor_memory > TENSOR_MEMORY_LIMIT:
        return f"needs {result.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_LIMIT}"
    return ""


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) per thread of the one kernel in `cubin`, by the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
        registers, frame = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
        # A frame need not be used. The kernels have no arrays of their own, so what is stored in it is a spill.
        stores = re.findall(r"\bSTL(?:\.(\d+))?", _tool("nvdisasm", "-c", file.name)) if frame else []
    return registers, sum(int(bits or 32) // 8 for bits in stores)


def _tool(name: str, *arguments: str) -> str:
    from triton import knobs

    command = [getattr(knobs.nvidia, name).path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Compile and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="only this folder of kernels/")
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="compute capabilities, with commas")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--csv", metavar="FILE", help="also write the table there")
    args = parser.parse_args(argv)
    chosen = [module for module in modules() if args.op in (None, op_of(module))]
    archs = [int(arch) for arch in args.arch.split(",")]
    if not chosen:
        parser.error(f"--op: expected one of {', '.join(sorted({op_of(m) for m in modules()}))}, got {args.op}")
    if unknown := set(archs) - set(ARCHITECTURES):
        parser.error(f"--arch: expected of {', '.join(map(str, ARCHITECTURES))}, got {', '.join(map(str, unknown))}")
    # The interpreter would take the kernels' place. The processes below read this before they import Triton.
    os.environ.pop("TRITON_INTERPRET", None)

    start = time.perf_counter()
    errors = [f"{module}: {name} has no case in aot_cases" for module in chosen for name in uncovered(module)]
    counts = [(m, len(importlib.import_module(m).aot_cases(arch // 10)), arch) for arch in archs for m in chosen]
    print(f"{'':7} {'kernel':58}registers  spilled  shared  tensor  matrix")
    results = []
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), os.nice, (10,)) as pool:
        pending = [pool.submit(compile_case, m, i, arch) for m, count, arch in counts for i in range(count)]
        for future in pending:
            result = future.result()
            results.append(result)
            print(result.line(), flush=True)
    errors += [f"sm_{r.arch} {r.kernel}: {r.error}" for r in results if r.error]
    print(f"{len(results)} kernels in {time.perf_counter() - start:.0f} s, {len(errors)} errors", *errors, sep="\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Compiled)])
            writer.writeheader()
            writer.writerows(asdict(result) for result in results)
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
