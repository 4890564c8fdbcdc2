"""Compiles every kernel for a GPU that need not be there; run by a test, in a process where Triton does not interpret.

Each once with 64-bit sizes and strides, and once as launches specialise it: 32-bit, arguments of 1 as constants.

python tests/compile_kernels.py [COMPUTE_CAPABILITY]
"""

import inspect
import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ima_seg.ops import elementwise_kernels, logits_kernels

FLOATS = ("partial", "alpha", "eps", "low", "high", "length", "share", "radius", "scalars", "loss", "sums", "voxels",
          "upstream", "checks")  # fmt: skip
NUMBERS = {"OUTPUTS": 4, "BLOCK": 1024, "PARTS": 16, "CHUNK": 16}


def signatures(kernel, image, truth):
    """One for each choice of flags: argument name -> type, and the constants."""
    names = list(inspect.signature(kernel.fn).parameters)
    flags = [n for n in names if n.isupper() and n not in NUMBERS]
    for choice in itertools.product((False, True), repeat=len(flags)):
        constants = {n: NUMBERS[n] for n in names if n in NUMBERS} | dict(zip(flags, choice, strict=True))
        types = {}
        for name in names:
            if name in constants:
                types[name] = "constexpr"
            elif name == "partial" and kernel is logits_kernels.hard_counts:
                types[name] = "*i32"
            elif name in FLOATS:
                types[name] = "*fp32"
            elif name == "truth":
                types[name] = truth
            elif name in ("mask", "known"):
                types[name] = "*u8"
            elif name == "seeds":
                types[name] = "*i64"
            elif name in ("delta", "gradient", "out", "image", "inner", "outer", "logits"):
                types[name] = image
            elif name == "smooth":
                types[name] = "fp32"
            else:
                types[name] = "i64" if name.endswith(("_row", "_class", "size")) else "i32"
        yield types, constants


def specialise(types, constants, image, truth):
    """Change a signature into that of a launch with a single class, voxel and program, without mask."""
    for name in types:
        if name in ("size", "outputs", "parts") or name.endswith(("_row", "_class", "_voxel")):
            types[name], constants[name] = "constexpr", 1
        elif name in ("mask", "known"):
            types[name] = image if name == "mask" else truth
    constants |= {name: value for name, value in (("OUTPUTS", 2), ("PARTS", 1)) if name in constants}


def main() -> None:
    """Compile all, print what was."""
    target = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)
    for module in (elementwise_kernels, logits_kernels):
        for name, kernel in vars(module).items():
            if not isinstance(kernel, JITFunction) or name.startswith("_"):
                continue
            variants = 0
            for image, truth, specialised in (("*fp32", "*u8", False), ("*bf16", "*i16", True)):
                for types, constants in signatures(kernel, image, truth):
                    if specialised:
                        specialise(types, constants, image, truth)
                    source = ASTSource(kernel, types, {(list(types).index(n),): v for n, v in constants.items()})
                    assert triton.compile(source, target=target).asm["ptx"]
                    variants += 1
            print(f"{name}: {variants} variants", flush=True)


if __name__ == "__main__":
    main()
