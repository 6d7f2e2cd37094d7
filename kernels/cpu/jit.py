"""How functions for the CPU are compiled, and the few instructions for which Numba has no name.

A compiled function is kept on disk, so that only the first process waits for it.
"""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic

__all__ = ["HALF", "ONE", "ZERO", "add_atomically", "exp", "narrow", "native", "summing", "wait_for", "widen"]

cgutils: Any = _cgutils  # without types
FLOAT, WORD, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _cache_folder() -> str:
    """Return a folder of its own for each version of this package.

    Numba looks for changes in the file of a function alone, and not in those from which it calls others.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return str(Path(home) / "gpt" / f"numba-{digest.hexdigest()[:16]}")


CACHE = _cache_folder()


def _compiled(fastmath: set[str]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator. The function holds no GIL, looks at no bounds, and divides by 0 as IEEE says."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": fastmath}

    def decorate(function: Callable[..., Any]) -> Any:
        config: Any = numba.config
        before, config.CACHE_DIR = config.CACHE_DIR, CACHE
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # there is no folder that may be written
            return numba.njit(**options)(function)
        finally:
            config.CACHE_DIR = before

    return decorate


if TYPE_CHECKING:
    # mypy skips the bodies of functions that are marked so: their integers have 32 bits or 64, their floats 32.
    from typing import no_type_check as native
    from typing import no_type_check as summing
else:
    native = _compiled({"contract"})
    # These sums may be taken in any order: else they are not vectorised. Infinities and NaN keep their meaning.
    summing = _compiled({"contract", "reassoc", "nsz", "arcp"})


@intrinsic
def widen(typing: Any, x: Any) -> tuple[Any, Any]:
    """Return a float32 as it is; of a uint16 that holds a bf16, its value in float32."""

    def bf16(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], WORD), WORD(16)), FLOAT)

    return types.float32(x), bf16 if x == types.uint16 else lambda context, builder, sig, args: args[0]


@intrinsic
def narrow(typing: Any, x: Any, like: Any) -> tuple[Any, Any]:
    """Return a float32 as an element of arrays like this one: itself, or the nearest bf16 (ties to even) as uint16."""

    def bf16(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], WORD)
        odd = builder.and_(builder.lshr(bits, WORD(16)), WORD(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, WORD(0x7FFF))), WORD(16))
        return builder.trunc(rounded, ir.IntType(16))

    return like.dtype(types.float32, like), bf16 if like.dtype == types.uint16 else lambda c, b, sig, args: args[0]


ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
# Below this, exp is taken as 0: its results would be denormal.
LOWEST = np.float32(-87)
# exp(x) = 2^n exp(r), where n is x / ln 2, rounded. The first part of ln 2 has so few digits that n times it is exact.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1 / math.log(2)), np.float32(0.693359375), np.float32(-2.12194440e-4)
# Cephes' polynomial for (exp(r) - 1 - r) / r^2 where |r| is at most ln(2) / 2.
P5, P4, P3, P2, P1, P0 = (
    np.float32(each)
    for each in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@native
def exp(x):
    """exp(x) in fp32 for x <= 0, right to about an ulp, in a form that LLVM vectorises."""
    bounded = max(x, LOWEST)
    whole = np.int32(bounded * LOG2_E - HALF)
    part = np.float32(whole)
    rest = (bounded - part * LN2_HIGH) - part * LN2_LOW
    series = ((((P5 * rest + P4) * rest + P3) * rest + P2) * rest + P1) * rest + P0
    power = np.int32(np.int32(whole + 127) << 23).view(np.float32)
    result = (series * (rest * rest) + rest + ONE) * power
    return ZERO if x < LOWEST else result


def _pause(builder: Any) -> None:
    """Tell the CPU that it is waiting in a loop, on those that want to know."""
    processor = llvm.get_process_triple().partition("-")[0]
    if processor in ("x86_64", "i686"):
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), PAUSE), [])


PAUSE = "llvm.x86.sse2.pause"
SPINS = 2000  # turns of a waiting loop, some 20 us, before it lets another thread have the core


@intrinsic
def add_atomically(typing: Any, array: Any, index: Any, number: Any) -> tuple[Any, Any]:
    """Add to an element of an int64 array that other threads read and write, and return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), arguments[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def wait_for(typing: Any, array: Any, index: Any, number: Any) -> tuple[Any, Any]:
    """Return as soon as an element of an int64 array, which other threads raise, is at least this number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [arguments[1]])
        turns = cgutils.alloca_once_value(builder, LONG(0))
        head, again, rest, done = (builder.append_basic_block(name) for name in ("head", "again", "rest", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        reached = builder.icmp_signed(">=", builder.load_atomic(place, "seq_cst", 8), arguments[2])
        builder.cbranch(reached, done, again)
        builder.position_at_end(again)
        _pause(builder)
        count = builder.add(builder.load(turns), LONG(1))
        builder.store(count, turns)
        builder.cbranch(builder.icmp_signed(">", count, LONG(SPINS)), rest, head)
        builder.position_at_end(rest)
        if os.name == "posix":
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(WORD, []), "sched_yield"), [])
        builder.branch(head)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate
