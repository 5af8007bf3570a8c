"""Triton's kernels against float64, in its interpreter, and compiled for GPUs without one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed: pip install triton")

# In processes of their own: Triton reads the variable when kernels are declared.
INTERPRETED = """
import sys
import torch
from torch.nn import functional
from megaseg_dask.inference import kernels

torch.manual_seed(0)
LAST = torch.channels_last_3d

def norm_of(n_channels):
    norm = torch.nn.InstanceNorm3d(n_channels, affine=True)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    torch.nn.init.normal_(norm.bias)
    return norm

def exact(values, norm):
    return functional.instance_norm(
        values.double(), weight=norm.weight.double(), bias=norm.bias.double()
    )

for n_channels, shape in ((32, (6, 9, 11)), (24, (4, 5, 7)), (320, (2, 3, 4)), (8, (8, 16, 17))):
    values, residual = (
        (torch.randn(2, n_channels, *shape) * 3 + 7).contiguous(memory_format=LAST) for _ in "ab"
    )
    norm, residual_norm = norm_of(n_channels), norm_of(n_channels)
    cases = {
        "none": (None, None, 0),
        "plain": (residual, None, residual.double()),
        "normalized": (residual, residual_norm, exact(residual, residual_norm)),
    }
    for name, (other, other_norm, added) in cases.items():
        expected = functional.leaky_relu(exact(values, norm) + added, 0.01)
        both = torch.zeros(2, 2 * n_channels, *shape).contiguous(memory_format=LAST)
        found = kernels.norm_act(values, norm, 0.01, other, other_norm, both[:, n_channels:])
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < 1e-6, (n_channels, name, error)
        assert found.is_contiguous(memory_format=LAST)
        assert torch.equal(both[:, n_channels:], found)
        assert not both[:, :n_channels].any()
        one = values[1:].contiguous(memory_format=LAST)
        other_one = None if other is None else other[1:].contiguous(memory_format=LAST)
        assert torch.equal(kernels.norm_act(one, norm, 0.01, other_one, other_norm), found[1:])
        print(n_channels, name, error)
"""

COMPILED = """
import re
import subprocess
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from megaseg_dask.inference import kernels

MEASURE = {"values": "*fp16", "moments": "*fp32", "n_voxels": "i32"}
MERGE = {
    "moments": "*fp32", "weight": "*fp32", "bias": "*fp32", "affine": "*fp32",
    "n_voxels": "i32", "n_chunks": "i32", "epsilon": "fp32",
}
APPLY = {
    "values": "*fp16", "affine": "*fp32", "residual": "*fp16", "residual_affine": "*fp32",
    "first_out": "*fp16", "second_out": "*fp16", "n_voxels": "i32", "second_stride": "i32",
    "slope": "fp32",
}

def compiled(kernel, signature, sizes, n_warps, capability):
    names = [*signature, *sizes]
    signature = {**signature, **dict.fromkeys(sizes, "constexpr")}
    constants = {(names.index(name),): value for name, value in sizes.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in sizes
               and n not in ("epsilon", "slope", "n_chunks")}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": n_warps})

for capability in (80, 90, 100):
    for n_channels in (8, 24, 32, 64, 320):
        width = triton.next_power_of_2(n_channels)
        tile = kernels._tile(width)
        sizes = {"C": n_channels, "CHUNK": 4 * tile, "WIDTH": width}
        apply = {"C": n_channels, "TILE": tile, "WIDTH": width, "RESIDUAL": 2, "TWICE": True}
        for kernel, signature, constants, n_warps in (
            (kernels._measure, MEASURE, {**sizes, "TILE": tile}, 8),
            (kernels._merge, MERGE, {**sizes, "ROWS": tile}, 8),
            (kernels._apply, APPLY, apply, 8),
        ):
            built = compiled(kernel, signature, constants, n_warps, capability)
            open("kernel.cubin", "wb").write(built.asm["cubin"])
            ptxas = get_ptxas(capability)
            open("kernel.ptx", "w").write(built.asm["ptx"])
            arch = re.search(r"[.]target (sm_\\w+)", built.asm["ptx"])[1]
            told = subprocess.run(
                [ptxas.path, "-v", f"-arch={arch}", "kernel.ptx", "-o", "kernel.out"],
                capture_output=True, text=True, check=True,
            ).stderr
            registers = int(re.search(r"Used (\\d+) registers", told)[1])
            spilled = sum(map(int, re.findall(r"(\\d+) bytes spill", told)))
            print(capability, kernel.__name__, n_channels, registers, spilled)
            assert not spilled, told
"""


def run(script, folder, **environment):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    file = folder / "script.py"
    file.write_text(script)
    ended = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder), **environment},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@needs_triton
def test_norms_are_those_of_float64_and_a_sample_does_not_depend_on_its_batch(tmp_path):
    assert run(INTERPRETED, tmp_path, TRITON_INTERPRET="1").count("\n") == 12


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_all_tensor_core_generations_without_spills(tmp_path):
    assert run(COMPILED, tmp_path).count("\n") == 45
