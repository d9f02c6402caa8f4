"""The machine code of the fused kernel, compiled ahead of time for GPUs that need not be there.

    python -m benchmarks.kernels.compiled

prints, for each kind of work and number of warps, what the code takes and how it reaches memory.
Triton and its assembler do the compiling; what is read here is what would run.
"""

import argparse
import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hooked_vlm.engine.kernels import triton as fused
from hooked_vlm.engine.kernels.checks import Asked


ARCHITECTURES = (80, 90)
WIDTHS = {"Qwen2-VL-7B": 3584, "Gemma-3-4b": 2560}
WORK = ("patch", "add", "project")
REGISTERS, THREADS, PROGRAMS, REGISTER_UNIT = 65536, 2048, 32, 256
"""Of one multiprocessor of sm_80 and sm_90; a warp takes registers in units."""
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Code:
    """What one compiled kernel is made of."""

    warps: int
    block_bytes: int
    """Bytes of a token, padded to the width of a program."""
    ptx: str
    sass: str
    registers: int
    stack: int
    local: int
    shared: int

    @property
    def accesses(self) -> Counter[str]:
        """How often each thread reaches global memory, by instruction and width in bits."""
        found: Counter[str] = Counter()
        for kind, options in re.findall(r"\b(ld|st)\.global((?:\.\w+)*)", self.ptx):
            parts = options.split(".")
            count = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
            width = next(int(p[1:]) for p in reversed(parts) if re.fullmatch(r"[bfsu]\d+", p))
            found[f"{kind} {count * width}"] += 1
        return found

    @property
    def wide_in_sass(self) -> Counter[str]:
        """128-bit accesses to global memory in the machine code itself."""
        found = re.findall(r"\b(LDG|STG)\.E(?:\.\w+)*?\.128\b", self.sass)
        return Counter(found)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that can be there at once, by registers."""
        unit = REGISTER_UNIT
        by_warp = -(-self.registers * 32 // unit) * unit
        by_registers = REGISTERS // (by_warp * self.warps)
        programs = min(by_registers, THREADS // (32 * self.warps), PROGRAMS)
        return programs * 32 * self.warps / THREADS

    @property
    def stack_share(self) -> float:
        """Bytes that threads keep on their stacks, as a share of those that wide accesses move."""
        return self.stack * 32 * self.warps / (self.bytes_per_byte * self.block_bytes)

    @property
    def bytes_per_byte(self) -> float:
        """Bytes that wide accesses load and store for each byte written, all branches taken."""
        wide = self.accesses["ld 128"] + self.accesses["st 128"]
        return wide * 16 * 32 * self.warps / self.block_bytes


@functools.cache
def compiled(arch: int, d: int, dtype: torch.dtype, work: str, warps: int) -> Code:
    """Returns the kernel as it is compiled for aligned activations of a width and dtype."""
    # Not on every machine.
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    arguments = _arguments(d, dtype, work)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    # What a launch tells the compiler: which numbers are 1, and which divide by 16.
    for i, name in enumerate(fused.kernel.arg_names):
        value = arguments[name]
        if name.isupper() or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = _TYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    found = triton.compile(
        ASTSource(fused.kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, **fused.EXACT},
    )
    printed = _read(Path(str(triton.__file__)).parent, found.asm["cubin"])
    fields = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", printed))
    return Code(
        warps,
        arguments["BLOCK"] * dtype.itemsize,
        found.asm["ptx"],
        printed,
        *(int(fields[name]) for name in ("REG", "STACK", "LOCAL", "SHARED")),
    )


def _arguments(d: int, dtype: torch.dtype, work: str) -> dict[str, Any]:
    """What a launch for such work gets: no tensor holds anything, only shapes count."""
    tokens = torch.empty(2, 32, d, dtype=dtype)
    row, place = torch.empty(16, dtype=torch.int64), torch.empty(16, 32, dtype=torch.int64)
    asked = Asked(tokens, tokens, place, row, row)
    if work != "patch":
        steering = (place.bool(), torch.empty(2, d, dtype=dtype), row, row.float(), work)
        asked = Asked(tokens, tokens, place, row, row, *steering)
    return fused.arguments_of(asked, torch.empty(16, 32, d, dtype=dtype))


def _read(package: Path, cubin: bytes) -> str:
    """Returns what machine code takes, and the code, as the assembler's tool prints them."""
    tool = package / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [tool, "-res-usage", "-sass", file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(d: int) -> str:
    """Returns what docs/measured/kernels.md holds, as Markdown; the GPUs' numbers by the stroke."""
    lines = [
        "| work | warps | registers | spilled, B | occupancy | loads + stores of 128 bits "
        "| bytes moved for each written |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for work in WORK:
        for warps in fused.warps_for(d, 2):
            found = [compiled(arch, d, torch.bfloat16, work, warps) for arch in ARCHITECTURES]
            cells = [
                [str(code.registers) for code in found],
                [str(code.local + code.stack) for code in found],
                [f"{code.occupancy:.0%}" for code in found],
                [f"{code.wide_in_sass['LDG']} + {code.wide_in_sass['STG']}" for code in found],
                [f"{code.bytes_per_byte:.0f}" for code in found],
            ]
            # One number where both say the same.
            joined = [" / ".join(dict.fromkeys(each)) for each in cells]
            lines.append(f"| {work} | {warps} | {' | '.join(joined)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--width", type=int, default=WIDTHS["Qwen2-VL-7B"])
    print(table(parser.parse_args().width))
