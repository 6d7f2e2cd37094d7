"""The micro-kernel: a few rows times a strip of 64 columns of weights, in vectors of the CPU.

LLVM's own vectors of a loop would add up along a row of weights, and end with a sum over the lanes. So the weights are
packed the other way round: a strip holds 64 columns of x @ w, as [depth, 64], one after the other. A vector holds 16
columns, one number of x meets all of them at once, and the sums stay in registers from the first to the last. Every sum
is taken in the order of the depth, whatever else is computed beside it: a row's result does not depend on the batch.

The IR is written here, as Triton's kernels are, a function for each number of rows and columns of a tile. Weights are
fp32, bf16 (held as uint16), or int8 with a scale for every 32 of a column; x and the sums are fp32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.core import codegen
from numba.extending import intrinsic

# Numba has no types.
cgutils: Any = _cgutils
_codegen: Any = codegen
_config: Any = numba.config
STRIP = 64  # columns
LANES = 16  # columns of a vector; where registers are shorter, LLVM takes two or four for one
GROUP = 32  # numbers of a column that share a scale
# An int8 strip is a row of such groups: the scales of its columns (bf16), then GROUP rows of STRIP numbers.
GROUP_BYTES = 2 * STRIP + GROUP * STRIP

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, POINTER = ir.VectorType(F32, LANES), ir.PointerType()
ROWS = (6, 4, 2, 1)  # of tiles: six of four vectors have 24 sums, which AVX-512 holds in its 32 registers
WIDE = "+avx512f" in (_config.CPU_FEATURES or _codegen.get_host_cpu_features())


def widths(kind: str, rows: int) -> tuple[int, ...]:
    """Return how many vectors wide tiles of so many rows may be. AVX2 has registers for 12 sums of half a vector.

    int8 has a second sum beside each.
    """
    if kind == "int8":
        return (4, 1) if WIDE and rows <= 2 else (2, 1) if WIDE or rows == 1 else (1,)
    return (4, 1) if WIDE or rows == 1 else (1,)


def long(number: int) -> Any:
    return ir.Constant(I64, number)


def at(builder: Any, pointer: Any, index: Any, size: int) -> Any:
    """Return the address of an element of `size` bytes."""
    return builder.gep(pointer, [builder.mul(index, long(size))], source_etype=I8)


def splat(builder: Any, number: Any) -> Any:
    nothing = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(nothing, number, I32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def load(builder: Any, kind: str, pointer: Any) -> Any:
    """Return the 16 weights at an address, in float32."""
    if kind == "fp32":
        return builder.load(pointer, typ=VECTOR, align=4)
    if kind == "int8":
        return builder.sitofp(builder.load(pointer, typ=ir.VectorType(I8, LANES), align=1), VECTOR)
    words = ir.VectorType(I32, LANES)
    raw = builder.zext(builder.load(pointer, typ=ir.VectorType(I16, LANES), align=1), words)
    return builder.bitcast(builder.shl(raw, ir.Constant(words, [16] * LANES)), VECTOR)


Sums = list[list[Any]]  # [row][vector]


def loop(builder: Any, begin: Any, end: Any, step: int, sums: Sums, body: Callable[[Any, Any, Sums], Sums]) -> Sums:
    """Run the body for begin, begin + step, ... below end. The sums stay in registers from turn to turn."""
    before = builder.block
    head, inside, done = (builder.append_basic_block(name) for name in ("head", "inside", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(begin, before)
    carried = [[builder.phi(VECTOR) for _ in row] for row in sums]
    builder.cbranch(builder.icmp_signed("<", index, end), inside, done)
    builder.position_at_end(inside)
    found = body(builder, index, carried)
    index.add_incoming(builder.add(index, long(step)), builder.block)
    for phis, first, last in zip(carried, sums, found, strict=True):
        for phi, one, other in zip(phis, first, last, strict=True):
            phi.add_incoming(one, before)
            phi.add_incoming(other, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return carried


def tile(module: Any, kind: str, rows: int, columns: int) -> Any:
    """Return the function (x, x_stride, w, w_stride, depth, out, out_stride, add) of a tile of rows x columns vectors.

    Strides are in elements. out = x @ w, or where `add` is not 0, out + x @ w. In int8, w is where the strip begins,
    and w_stride the first of its columns.
    """
    name = f"gpt_tile_{kind}_{rows}_{columns}"
    if name in module.globals:
        return module.globals[name]
    arguments = [POINTER, I64, POINTER, I64, I64, POINTER, I64, I64]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    # Without this, LLVM takes vectors of 256 bits on CPUs where it finds those better as a rule. llvmlite knows no
    # attributes of text, but writes those that are there.
    set.add(function.attributes, '"min-legal-vector-width"="512"')
    x, x_stride, w, w_stride, depth, out, out_stride, add = function.args
    start = function.append_basic_block("start")
    builder = ir.IRBuilder(start)
    signature = ir.FunctionType(VECTOR, [VECTOR] * 3)
    multiply_add = cgutils.get_or_insert_function(module, signature, "llvm.fmuladd.v16f32")
    x_rows = [at(builder, x, builder.mul(x_stride, long(row)), 4) for row in range(rows)]
    places = []
    for row in range(rows):
        begin = at(builder, out, builder.mul(out_stride, long(row)), 4)
        places.append([at(builder, begin, long(column * LANES), 4) for column in range(columns)])

    held, ready = builder.append_basic_block("held"), builder.append_basic_block("ready")
    builder.cbranch(builder.icmp_signed("!=", add, long(0)), held, ready)
    builder.position_at_end(held)
    old = [[builder.load(place, typ=VECTOR, align=4) for place in row] for row in places]
    builder.branch(ready)
    builder.position_at_end(ready)
    sums = [[builder.phi(VECTOR) for _ in row] for row in places]
    for phis, values in zip(sums, old, strict=True):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(ir.Constant(VECTOR, [0.0] * LANES), start)
            phi.add_incoming(value, held)

    def step(builder: Any, k: Any, weights: Any, stride: Any, sums: Sums) -> Sums:
        """Add the products of number k of each row of x with row `weights` of the strip."""
        loaded = []
        for column in range(columns):
            size = {"fp32": 4, "bf16": 2, "int8": 1}[kind]
            place = builder.add(builder.mul(stride[0], stride[1]), long(column * LANES))
            loaded.append(load(builder, kind, at(builder, weights, place, size)))
        found = []
        for row in range(rows):
            number = splat(builder, builder.load(at(builder, x_rows[row], k, 4), typ=F32, align=4))
            found.append([builder.call(multiply_add, [loaded[c], number, sums[row][c]]) for c in range(columns)])
        return found

    # As many steps in a turn as keep the loop itself from costing anything.
    unrolled = 4 if rows == 1 else 2 if rows == 2 else 1
    if kind == "int8":

        def group(builder: Any, number: Any, sums: Sums) -> Sums:
            base = at(builder, w, number, GROUP_BYTES)
            values = at(builder, base, builder.add(w_stride, long(2 * STRIP)), 1)
            first = builder.mul(number, long(GROUP))

            def inner(builder: Any, k: Any, sums: Sums) -> Sums:
                for each in range(unrolled):
                    k_each = builder.add(k, long(each))
                    sums = step(builder, builder.add(first, k_each), values, (k_each, long(STRIP)), sums)
                return sums

            # What a group adds is scaled once, at its end.
            nothing = [[ir.Constant(VECTOR, [0.0] * LANES)] * columns for _ in range(rows)]
            added = loop(builder, long(0), long(GROUP), unrolled, nothing, inner)
            scaled = at(builder, base, w_stride, 2)
            scales = [load(builder, "bf16", at(builder, scaled, long(c * LANES), 2)) for c in range(columns)]
            return [
                [builder.call(multiply_add, [*each]) for each in zip(part, scales, whole, strict=True)]
                for part, whole in zip(added, sums, strict=True)
            ]

        groups = builder.sdiv(builder.add(depth, long(GROUP - 1)), long(GROUP))
        sums = loop(builder, long(0), groups, 1, sums, group)
    else:

        def steps(count: int) -> Callable[[Any, Any, Sums], Sums]:
            def body(builder: Any, k: Any, sums: Sums) -> Sums:
                for each in range(count):
                    k_each = builder.add(k, long(each))
                    sums = step(builder, k_each, w, (k_each, w_stride), sums)
                return sums

            return body

        whole = builder.and_(depth, long(-unrolled))
        sums = loop(builder, long(0), whole, unrolled, sums, steps(unrolled))
        if unrolled > 1:
            sums = loop(builder, whole, depth, 1, sums, steps(1))
    for each, values in zip(places, sums, strict=True):
        for place, value in zip(each, values, strict=True):
            builder.store(value, place, align=4)
    builder.ret_void()
    return function


@contextmanager
def while_room(builder: Any, place: Any, room: Any, step: int) -> Iterator[Any]:
    """Repeat what stands in the block as long as `step` more than the number at `place` is within the room."""
    head, inside, done = (builder.append_basic_block(name) for name in ("head", "inside", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    number = builder.load(place)
    builder.cbranch(builder.icmp_signed("<=", builder.add(number, long(step)), room), inside, done)
    builder.position_at_end(inside)
    yield number
    builder.store(builder.add(number, long(step)), place)
    builder.branch(head)
    builder.position_at_end(done)


KINDS = {types.float32: "fp32", types.uint16: "bf16", types.int8: "int8"}


@intrinsic
def multiply(typing: Any, x: Any, x_at: Any, x_stride: Any, w: Any, w_at: Any, w_stride: Any, depth: Any,
             out: Any, out_at: Any, out_stride: Any, rows: Any, columns: Any, add: Any) -> Any:  # fmt: skip
    """Compute out[rows, columns] = x[rows, depth] @ w[depth, columns], or with `add` 1 add that to out.

    x and out: float32; w: float32, uint16 (bf16) or int8 (groups of a packed strip). Each is an array, the element at
    which it begins, and how many elements its rows lie apart (of int8 none: a strip is as it is packed). `columns` is
    a multiple of 16.
    """
    kind = KINDS[w.dtype]
    size = {"fp32": 4, "bf16": 2, "int8": 1}[kind]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers = {}
        for name, index, element in (("x", 0, 4), ("w", 3, size), ("out", 7, 4)):
            data = context.make_array(signature.args[index])(context, builder, arguments[index]).data
            pointers[name] = at(builder, builder.bitcast(data, POINTER), arguments[index + 1], element)
        x_stride, w_stride, depth, out_stride, rows, columns, add = (arguments[n] for n in (2, 5, 6, 9, 10, 11, 12))
        wide = builder.sdiv(columns, long(LANES))

        def run(first: Any, count: int) -> None:
            x_here = at(builder, pointers["x"], builder.mul(first, x_stride), 4)
            out_here = at(builder, pointers["out"], builder.mul(first, out_stride), 4)
            column = cgutils.alloca_once_value(builder, long(0))
            for width in widths(kind, count):
                with while_room(builder, column, wide, width) as number:
                    first_column = builder.mul(number, long(LANES))
                    weights = [at(builder, pointers["w"], first_column, size), w_stride]
                    if kind == "int8":
                        weights = [pointers["w"], first_column]
                    place = at(builder, out_here, first_column, 4)
                    function = tile(builder.module, kind, count, width)
                    builder.call(function, [x_here, x_stride, *weights, depth, place, out_stride, add])

        done = cgutils.alloca_once_value(builder, long(0))
        for count in ROWS:
            with while_room(builder, done, rows, count) as first:
                run(first, count)
        return context.get_dummy_value()

    return types.void(x, *[types.int64] * 2, w, *[types.int64] * 3, out, *[types.int64] * 5), generate
