"""The benchmarks of the ops: what is timed is right, nothing is timed on red, tables say what the rows say."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import host, registry, report, run, timing
from ijepa_fast.kernels.common import dispatch, native
from ijepa_fast.kernels.varlen_attention.reference import varlen_attention

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def tiny(dtype=torch.float32):
    return registry.Batch(registry.MODELS["tiny"], 2, CPU, dtype)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_op_is_there_with_its_tests():
    assert set(registry.OPS) == set(dispatch.OPS)
    for op in registry.OPS:
        assert (ROOT / "kernels" / op).is_dir()
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()


@pytest.mark.parametrize("op", registry.OPS)
def test_providers_compute_what_the_reference_does(op):
    batch = tiny()
    for case in registry.OPS[op](batch):
        case.compiles = False
        works, wrong = run.usable(case, batch, None)
        assert not wrong
        assert set(works) == {"eager", *case.libraries, *case.own}


def test_padded_attention_is_the_reference_too():
    batch = tiny()
    cu_seqlens = batch.packed.context_cu_seqlens
    case = registry.varlen_attention(batch)[0]
    reference = run.work_of(lambda qkv: varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens), case.args)
    assert run.disagreement(run.work_of(case.eager, case.args), reference, CPU) < 1e-5


def test_bytes_are_those_of_arguments_and_results():
    batch = tiny(torch.bfloat16)
    for op in ("patchify", "layer_norm", "bias_gelu", "varlen_attention"):
        for case in registry.OPS[op](batch):
            outputs = run._tensors(case.eager(*case.args))
            least = sum(x.numel() * x.element_size() for x in (*case.args, *outputs))
            assert case.bytes[0] <= least < 1.1 * case.bytes[0]
    case = registry.adamw_ema(batch)[0]
    assert case.bytes[0] == 38 * sum(p.numel() for p in _tiny_encoder().parameters())


def _tiny_encoder():
    model = registry.MODELS["tiny"]
    dim, depth, heads, ratio = registry.ARCHITECTURES[model.arch]
    return registry.Encoder(model.crop, model.patch, dim, depth, heads, ratio)


def test_attention_flops_are_those_of_two_products_a_head():
    batch = tiny()
    case = registry.varlen_attention(batch)[0]
    lengths = batch.packed.context_cu_seqlens.diff().tolist()
    assert case.flops[0] == sum(2 * 2 * n * n * (batch.dim // batch.heads) for n in lengths) * batch.heads


def test_a_library_that_computes_something_else_is_left_out_and_an_own_one_is_an_error(capsys):
    x = torch.randn(5, 8, requires_grad=True)

    def broken(x):
        raise RuntimeError("needs the package nobody_has")

    def wrong_gradient(x):
        return x.detach() * 2 + (x - x.detach()) * 3

    case = registry.Case(
        "part",
        "5 x 8",
        (x,),
        eager=lambda x: x * 2,
        libraries={"missing": broken, "off": lambda x: x * 2.1, "right": lambda x: x + x},
        own={"csrc": wrong_gradient},
        compiles=False,
    )
    works, wrong = run.usable(case, tiny(), None)
    assert set(works) == {"eager", "right"}
    assert len(wrong) == 1
    assert "csrc: computes something else than the reference, off by 0.5" in wrong[0]
    printed = capsys.readouterr().out
    assert "left out: missing: needs the package nobody_has" in printed
    assert "left out: off: computes something else" in printed


def test_rows_are_written_as_csv_and_json(tmp_path, capsys):
    command = ["--op", "bias_gelu,adamw_ema", "--models", "tiny", "--images", "2", "--device", "cpu", "--tests-passed"]
    command += ["--providers", "eager,library,csrc", "--csv", str(tmp_path / "k.csv")]
    assert run.main([*command, "--rounds", "3", "--json", str(tmp_path / "k.json")]) == 0
    rows = rows_of(tmp_path / "k.csv")
    gelu = [("bias_gelu", p) for p in ("forward", "backward", "both")]
    assert {(r["op"], r["provider"], r["pass_"]) for r in rows} >= {
        *((op, "eager", p) for op, p in gelu),
        *((op, "csrc", p) for op, p in gelu if native.available()),
        *(("adamw_ema", p, "forward") for p in ("eager", "published loop", "AdamW fused, foreach")),
    }
    for row in rows:
        assert float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"])
        assert row["rounds"] == "3"
        assert f"torch {torch.__version__}" in row["versions"]
        share = float(row["gb_per_s"]) / float(row["copy_gb_per_s"])
        assert float(row["share_of_copy"]) == pytest.approx(share, rel=1e-3)
    assert [r["provider"] for r in json.loads((tmp_path / "k.json").read_text())] == [r["provider"] for r in rows]
    assert run.main([*command, "--rounds", "1", "--op", "bias_gelu"]) == 0
    again = [r for r in rows if r["op"] == "bias_gelu"]
    assert len(again) == len(gelu) * (2 if native.available() else 1)
    assert len(rows_of(tmp_path / "k.csv")) == len(rows) + len(again)


def test_no_figure_on_red(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    for op, line in (("layer_norm", "assert False"), ("bias_gelu", "assert True")):
        (tmp_path / "tests" / "ops" / f"test_{op}.py").write_text(f"def test_it():\n    {line}\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    command = ["--op", "layer_norm,bias_gelu", "--models", "tiny", "--images", "2", "--device", "cpu", "--rounds", "1"]
    assert run.main([*command, "--providers", "eager", "--csv", str(tmp_path / "k.csv")]) == 1
    assert {row["op"] for row in rows_of(tmp_path / "k.csv")} == {"bias_gelu"}
    assert "error: layer_norm: its tests fail, so it was not timed" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    for words, message in ((["--op", "gelu"], "--op: expected of"), (["--all", "--models", "S"], "--models: expected")):
        with pytest.raises(SystemExit):
            run.parse(words)
        assert message in capsys.readouterr().err


def test_works_take_turns_and_backward_gets_what_forward_gave(monkeypatch):
    monkeypatch.setattr(timing, "CPU_CACHE", 1024)
    calls = []

    def work(name):
        return timing.Work(lambda: calls.append(name) or name, lambda outputs: calls.append(f"{outputs} back"))

    only = timing.Work(lambda: calls.append("c"))
    times = timing.interleave({"a": work("a"), "b": work("b"), "c": only}, CPU, rounds=2)
    assert calls[-10:] == ["a", "a back", "b", "b back", "c"] * 2
    assert times["a"].both.shape == (2,)
    assert (times["a"].both == times["a"].forward + times["a"].backward).all()
    assert torch.tensor(times["c"].backward).isnan().all()


def row(provider, ms, date="2025-01-01", **others):
    base = {"op": "layer_norm", "model": "H/14", "part": "context", "pass_": "backward", "shape": "5 x 8"}
    base |= {"device": "a GPU", "versions": "torch 2", "dtype": "bf16", "commit": "abc", "date": date}
    base |= {"provider": provider, "ms": ms, "ms_20": ms, "ms_80": ms}
    base |= {"gb_per_s": "", "share_of_copy": "", "tflop_per_s": "", "share_of_matmul": ""}
    return base | others


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_tables_are_made_of_the_rows_of_the_last_run(tmp_path):
    rows = [row("eager", 9), row("triton", 1), row("compiled", 99)]
    rows += [row("eager", 8, "2025-02-01"), row("quack", 3, "2025-02-01"), row("slow", 5, "2025-02-01")]
    rows += [row("triton", 2, "2025-02-01", gb_per_s=1234, share_of_copy=0.5)]
    write(tmp_path / "k.csv", rows)
    text = "before\n<!-- table: kernels k.csv -->\nold\n<!-- end of table -->\nafter\n"
    new = report.render(text, tmp_path)
    assert new.startswith("before\n<!-- table: kernels k.csv -->\n")
    assert new.endswith("<!-- end of table -->\nafter\n")
    assert "old" not in new
    (line,) = (line for line in new.splitlines() if line.startswith("| layer_norm"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("layer_norm", "H/14 context: 5 x 8", "backward", "8", "-", "3 quack; 5 slow", "2 triton", "2-2"),
        *("1.23e+03", "50%", "-", "-", "4", "-", "1.5"),
    ]
    assert report.render(new, tmp_path) == new


def test_bounds_say_what_was_measured_or_that_nothing_was(tmp_path):
    text = "<!-- table: ops k.csv -->\n<!-- end of table -->"
    assert report.render(text, tmp_path).count("| not measured |") == len(report.BOUNDS)
    write(tmp_path / "k.csv", [row("compiled", 5), row("triton", 2)])
    new = report.render(text, tmp_path)
    assert "| layer_norm | context | backward | >= 1.8 x compiled | 2.50 x |" in new
    assert new.count("| not measured |") == len(report.BOUNDS) - 1


def test_rows_and_files_of_trees_with_changes_are_refused(tmp_path):
    rows = [row("eager", 9), row("triton", 3), row("eager", 8, "2025-02-01", commit="abc-dirty")]
    write(tmp_path / "k.csv", [*rows, row("triton", 1, "2025-02-01", commit="abc-dirty")])
    table = report.render("<!-- table: kernels k.csv -->\n<!-- end of table -->", tmp_path)
    assert "| 9 | - | - | 3 triton |" in table
    assert "Refused: 2 rows of trees with changes that no commit has." in table
    write(tmp_path / "k.csv", rows[2:])
    for kind in ("kernels", "ops"):
        assert "Refused: 1 rows" in report.render(f"<!-- table: {kind} k.csv -->\n<!-- end of table -->", tmp_path)
    (tmp_path / "d.json").write_text(json.dumps({"commit": "abc-dirty", "stages": []}))
    (tmp_path / "l.json").write_text(json.dumps({"records": [{"commit": "abc"}, {"commit": "def-dirty"}]}))
    for kind, file, commit in (("stages", "d.json", "abc-dirty"), ("learning", "l.json", "def-dirty")):
        table = report.render(f"<!-- table: {kind} {file} -->\n<!-- end of table -->", tmp_path)
        assert f"Refused: `{file}` was measured in a tree with changes that no commit has ({commit})" in table


def test_compiled_kernels_are_summed_up_by_op(tmp_path):
    base = {
        "arch": 80,
        "op": "fp8",
        "registers": 9,
        "spilled_bytes": 0,
        "shared_bytes": 1024,
        "matrix": "",
        "triton": "3",
    }
    hopper = base | {"arch": 90, "op": "attention", "matrix": "wgmma"}
    write(tmp_path / "aot.csv", [base, hopper, hopper | {"registers": 40, "spilled_bytes": 8}])
    lines = report.render("<!-- table: aot aot.csv -->\n<!-- end of table -->", tmp_path).splitlines()
    assert "| attention | 2 | - | 40, 1.0 | 8 | 2 wgmma on sm_90 |" in lines
    assert "| fp8 | 1 | 9, 1.0 | - | 0 | - |" in lines


def test_an_unknown_kind_of_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected a kind of kernels, .*, got 'chart'"):
        report.render("<!-- table: chart k.csv -->\n<!-- end of table -->", tmp_path)


def test_documents_say_what_the_results_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


SPILLING = """
import triton
import triton.language as tl

from ijepa_fast.kernels.common.aot import Case


@triton.jit
def _spilling_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x * tl.sum(x))


@triton.jit
def _wrong_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), tl.dot(tl.zeros((16, 16), tl.float16), tl.zeros((32, 16), tl.float16)))


@triton.jit
def _forgotten_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


def aot_cases(capability=9):
    return [
        Case("spilling", _spilling_kernel, {"N": 32768}, 1, types={"x_ptr": "*fp32", "out_ptr": "*fp32"}),
        Case("wrong", _wrong_kernel, {"N": 16}, 4, types={"x_ptr": "*fp32"}),
        Case("small", _spilling_kernel, {"N": 128}, 4, types={"x_ptr": "*fp32", "out_ptr": "*fp32"}),
    ]
"""
CHECK = "import sys; from bench import aot; aot.modules = lambda: ['a.b.c.spilling']; sys.exit(aot.main({}))"


@pytest.mark.slow
def test_ahead_of_time_compilation_fails_on_a_spill_a_broken_and_a_forgotten_kernel(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "spilling.py").write_text(SPILLING)
    words = ["--arch", "90", "--processes", "1", "--csv", str(tmp_path / "aot.csv")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "TRITON_CACHE_DIR": str(tmp_path / "c")}
    done = subprocess.run(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    {CHECK.format(words)}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "a.b.c.spilling: _forgotten_kernel has no case in aot_cases" in done.stdout
    rows = {row["kernel"]: row for row in rows_of(tmp_path / "aot.csv")}
    assert int(rows["spilling"]["spilled_bytes"]) > 0
    assert "does not compile" in rows["wrong"]["error"]
    assert rows["small"]["error"] == ""
    assert int(rows["small"]["registers"]) > 0


@pytest.mark.slow
def test_ahead_of_time_compilation_passes_what_is_right(tmp_path):
    pytest.importorskip("triton")
    words = ["--op", "patchify", "--arch", "90", "--processes", "1"]
    done = subprocess.run([sys.executable, "bench/aot.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kernels in" in done.stdout


def test_the_host_time_of_a_call_is_a_row_of_each_case(tmp_path, capsys):
    path = tmp_path / "host.json"
    wanted = ["--ops", "layer_norm,bias_gelu", "--device", "cpu", "--rounds", "1", "--json", str(path)]
    assert host.main(wanted) == 0
    rows = json.loads(path.read_text())["rows"]
    cases = [case for op in ("layer_norm", "bias_gelu") for case in registry.OPS[op](tiny(torch.bfloat16)) if case.own]
    assert len(rows) == len(cases)
    for row in rows:
        assert min(row["ours_forward_us"], row["ours_both_us"]) > 0
    assert report.host(path)[2:] == capsys.readouterr().out.splitlines()[1:]
    with pytest.raises(SystemExit):
        host.main(["--ops", "relu"])
