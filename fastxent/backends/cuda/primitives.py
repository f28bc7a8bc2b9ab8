"""What a kernel may ask of a GPU, through numba-cuda; `simulated` gives the same names in NumPy.

The only module, with `lanes` and `codecs`, that knows what numba-cuda has for kernels: these are built from a
namespace of these functions. Global memory is addressed by int64 byte addresses, so no array type, stride or framework
is ever part of a kernel's signature. Shared memory is one dynamic block of bytes, addressed from 0. A word of 16 bytes
is four int32 lanes; what the numbers in it are is the business of a format (`form`).
"""

import functools

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

from fastxent.backends.cuda import lanes
from fastxent.backends.cuda.codecs import WORD, codec, highest_of
from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.lanes import INT32, Lanes, assembly, caster, filler, joined, split
from fastxent.rowmath import Table

_WORD = ir.VectorType(INT32, 4)
_INT16, _INT64, _HALF = ir.IntType(16), ir.IntType(64), ir.HalfType()
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_SHARED = 3
_WARP, ALL_LANES = 32, 0xFFFFFFFF

function = cuda.jit(device=True, forceinline=True)


@intrinsic
def _thread(typing):
    return types.int32(), lambda context, builder, sig, args: assembly(builder, INT32, "mov.u32 $0, %tid.x;", "=r", [])


@intrinsic
def _block(typing):
    return types.int32(), lambda context, builder, sig, args: assembly(
        builder, INT32, "mov.u32 $0, %ctaid.x;", "=r", []
    )


@function
def _among(width):
    """The lanes of a warp that are this thread's neighbours, ``width`` of them, a power of two."""
    if width == _WARP:
        return ALL_LANES
    return ((1 << width) - 1) << (_thread() & (_WARP - width))


@function
def _shuffle_xor(x, distance, width):
    return cuda.shfl_xor_sync(_among(width), x, distance)


@function
def _sync_block():
    cuda.syncthreads()


@function
def _sync_warp(width):
    cuda.syncwarp(_among(width))


@intrinsic
def _anew(typing, number):
    """The same int32, as if a loop changed it: what is made of it there is not kept in registers all through it."""

    def lower(context, builder, sig, args):
        args = _cast(context, builder, sig, args, types.int32)
        return assembly(builder, INT32, "mov.b32 $0, $1;", "=r,r", args, side_effect=True)

    return types.int32(number), lower


def _cast(context, builder, sig, args, *kinds):
    """The arguments as what the intrinsic is made for: Numba hands it whole numbers of any width."""
    return [
        value if have == want else context.cast(builder, value, have, want)
        for value, have, want in zip(args, sig.args, kinds, strict=True)
    ]


def _pointer(builder, address, kind):
    return builder.inttoptr(address, ir.PointerType(kind, 1))


def _shared_pointer(builder, offset, kind):
    module = builder.module
    name = "fastxent_shared"
    if name in module.globals:
        memory = module.globals[name]
    else:
        memory = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), 0), name, _SHARED)
        memory.linkage, memory.align = "external", 16
    first = builder.ptrtoint(memory, INT32)
    return builder.inttoptr(builder.add(first, offset), ir.PointerType(kind, _SHARED))


def _access(result, kind, pointer, align):
    where = types.int64 if pointer is _pointer else types.int32

    @intrinsic
    def load(typing, address):
        def lower(context, builder, sig, args):
            (address,) = _cast(context, builder, sig, args, where)
            return builder.load(pointer(builder, address, kind), align=align)

        return result(address), lower

    @intrinsic
    def store(typing, address, value):
        def lower(context, builder, sig, args):
            address, value = _cast(context, builder, sig, args, where, result)
            builder.store(value, pointer(builder, address, kind), align=align)
            return context.get_dummy_value()

        return types.void(address, value), lower

    return load, store


load_word, store_word = _access(WORD, _WORD, _pointer, 16)
shared_load_word, shared_store_word = _access(WORD, _WORD, _shared_pointer, 16)
load_float64, store_float64 = _access(types.float64, _DOUBLE, _pointer, 8)
load_int64, store_int64 = _access(types.int64, _INT64, _pointer, 8)
load_int32, _ = _access(types.int32, INT32, _pointer, 4)
shared_load_float64, shared_store_float64 = _access(types.float64, _DOUBLE, _shared_pointer, 8)


@intrinsic
def _fetch_add(typing, address, value):
    """An int64 added to the counter at ``address``, and what that was before. What this thread, and those it has met at
    a barrier, stored before is seen by whoever adds next, and those it meets then.
    """

    def lower(context, builder, sig, args):
        text, args = (
            "atom.acq_rel.gpu.global.add.u64 $0, [$1], $2;",
            _cast(context, builder, sig, args, types.int64, types.int64),
        )
        return assembly(builder, _INT64, text, "=l,l,l,~{memory}", args, side_effect=True)

    return types.int64(address, value), lower


@intrinsic
def _publish(typing, address, value):
    """Store an int64 after all that this thread, and those it has met at a barrier, stored before."""

    def lower(context, builder, sig, args):
        text, args = "st.release.gpu.global.u64 [$0], $1;", _cast(context, builder, sig, args, types.int64, types.int64)
        assembly(builder, ir.VoidType(), text, "l,l,~{memory}", args, side_effect=True)
        return context.get_dummy_value()

    return types.void(address, value), lower


@intrinsic
def _look(typing, address):
    """Load an int64, and nothing after it before it."""

    def lower(context, builder, sig, args):
        text = "ld.acquire.gpu.global.u64 $0, [$1];"
        return assembly(builder, _INT64, text, "=l,l,~{memory}", args, side_effect=True)

    return types.int64(address), lower


@function
def _wait_for(address, value):
    """Wait until another block has published ``value`` at ``address``."""
    while _look(address) != value:
        pass


@intrinsic
def _raise_flag(typing, address, value):
    """The larger of the int64 at ``address`` and ``value``, left there."""

    def lower(context, builder, sig, args):
        text, args = "red.global.max.s64 [$0], $1;", _cast(context, builder, sig, args, types.int64, types.int64)
        assembly(builder, ir.VoidType(), text, "l,l,~{memory}", args, side_effect=True)
        return context.get_dummy_value()

    return types.void(address, value), lower


@intrinsic
def _add_to(typing, address, value):
    """An int64 added to the one at ``address``: whole numbers give the same sum in any order."""

    def lower(context, builder, sig, args):
        text, args = "red.global.add.u64 [$0], $1;", _cast(context, builder, sig, args, types.int64, types.int64)
        assembly(builder, ir.VoidType(), text, "l,l,~{memory}", args, side_effect=True)
        return context.get_dummy_value()

    return types.void(address, value), lower


@intrinsic
def _realigned(typing, first, second, shift):
    """16 bytes out of two words one after the other, from byte ``shift`` on."""

    def lower(context, builder, sig, args):
        args = _cast(context, builder, sig, args, WORD, WORD, types.int32)
        words = _shifted_words(builder, args)
        amount = builder.shl(builder.and_(args[2], INT32(3)), INT32(3))
        text = "shf.r.wrap.b32 $0, $1, $2, $3;"
        return joined(
            builder,
            [assembly(builder, INT32, text, "=r,r,r,r", [words[k], words[k + 1], amount]) for k in range(4)],
        )

    return WORD(first, second, shift), lower


def _shifted_words(builder, args):
    """The eight words of two, five of them from the one that holds byte ``shift`` on: a shifter of two stages."""
    first, second, shift = args
    words = split(builder, first) + split(builder, second)
    for step in (2, 1):
        taken = builder.icmp_signed("!=", builder.and_(shift, INT32(4 * step)), INT32(0))
        words = [builder.select(taken, words[k + step], words[k]) for k in range(len(words) - step)]
    return words


_PART = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}


def _store_some(itemsize):
    """``store_some(address, word, first, stop)``: numbers ``first`` to ``stop`` of a word alone, one by one."""
    kind, letter = (_INT64, "l") if itemsize == 8 else (INT32, "r")
    suffix = _PART[itemsize]
    each = ir.VectorType(kind, 2 if itemsize == 8 else 4)

    def chosen(builder, k, first, stop):
        inside = builder.and_(builder.icmp_signed(">=", INT32(k), first), builder.icmp_signed("<", INT32(k), stop))
        return builder.zext(inside, INT32)

    @intrinsic
    def store_some(typing, address, word, first, stop):
        def lower(context, builder, sig, args):
            args = _cast(context, builder, sig, args, types.int64, WORD, types.int32, types.int32)
            text = f"{{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.{suffix} [$0], $1; }}"
            values = _unpacked(builder, split(builder, builder.bitcast(args[1], each)), itemsize)
            for k, value in enumerate(values):
                where = builder.add(args[0], ir.Constant(_INT64, k * itemsize))
                wanted = chosen(builder, k, args[2], args[3])
                constraints = f"l,{letter},r,~{{memory}}"
                assembly(builder, ir.VoidType(), text, constraints, [where, value, wanted], side_effect=True)
            return context.get_dummy_value()

        return types.void(address, word, first, stop), lower

    return store_some


def _unpacked(builder, words, itemsize):
    """The numbers of 32-bit words, each in the low bits of an integer of its own; wider ones as they are."""
    each = 4 // itemsize
    if each <= 1:
        return words
    mask = INT32((1 << (8 * itemsize)) - 1)
    return [builder.and_(builder.lshr(word, INT32(8 * itemsize * k)), mask) for word in words for k in range(each)]


def _from_bits(real):
    """An intrinsic that takes a number out of the low bits of an int64."""
    kind, integer = (_DOUBLE, _INT64) if real is types.float64 else (_FLOAT, INT32)

    @intrinsic
    def number(typing, bits):
        def lower(context, builder, sig, args):
            low = args[0] if integer is _INT64 else builder.trunc(args[0], integer)
            return builder.bitcast(low, kind)

        return real(bits), lower

    return number


@functools.cache
def form(name):
    """What a kernel knows of the number format ``name``."""
    about = FORMS[name]
    real = types.float64 if about.real is np.float64 else types.float32
    decode, encode = codec(name)
    load_one, store_one = load_float64, store_float64
    if real is types.float32:
        load_one, store_one = _access(real, _FLOAT, _pointer, 4)
    return Table(
        itemsize=about.itemsize,
        count=about.lanes,
        real=about.real,
        decode=decode,
        encode=encode,
        highest=highest_of(name) if about.itemsize > 1 else None,
        load_one=load_one,
        store_one=store_one,
        store_some=_store_some(about.itemsize),
        realigned=_realigned,
        lanes_of=filler(real, about.lanes),
        to_real=caster(real),
        from_bits=_from_bits(real),
    )


@intrinsic
def _leading(typing, x, like):
    """As many lanes of ``x`` as ``like`` has, the first ones."""
    result = Lanes(x.element, like.count)
    return result(x, like), lambda context, builder, sig, args: joined(builder, split(builder, args[0])[: like.count])


OPS = Table(
    function=function,
    fma=lanes.fma,
    at_least=lanes.at_least,
    bits=lanes.bits,
    shifted=lanes.shifted,
    shifted_onto=lanes.shifted_onto,
    flushed_product=lanes.flushed_product,
    where=lanes.where,
    rint=lanes.rint,
    to_float64=lanes.to_float64,
    exp2=lanes.exp2,
    reciprocal=lanes.reciprocal,
    absolute=lanes.absolute,
    copysign=lanes.copysign,
    everywhere=lanes.everywhere,
    larger=lanes.larger,
    less_the_base=lanes.less_the_base,
    weighted=lanes.weighted,
    numbered=lanes.first_numbers,
    sum_lanes=lanes.sum_lanes,
    peak_of_lanes=lanes.peak_of_lanes,
    lane=lanes.lane,
    concatenated=lanes.concatenated,
    first_half=lanes.first_half,
    second_half=lanes.second_half,
    leading=_leading,
    thread=_thread,
    anew=_anew,
    block=_block,
    shuffle_xor=_shuffle_xor,
    sync_block=_sync_block,
    sync_warp=_sync_warp,
    load_word=load_word,
    store_word=store_word,
    shared_load_word=shared_load_word,
    shared_store_word=shared_store_word,
    load_float64=load_float64,
    store_float64=store_float64,
    load_int64=load_int64,
    load_int32=load_int32,
    store_int64=store_int64,
    shared_load_float64=shared_load_float64,
    shared_store_float64=shared_store_float64,
    fetch_add=_fetch_add,
    publish=_publish,
    wait_for=_wait_for,
    raise_flag=_raise_flag,
    add_to=_add_to,
    int32=types.int32,
    int64=types.int64,
    form=form,
)
