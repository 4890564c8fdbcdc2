"""Triton kernels over images. Program (row, part) walks over every ``parts``-th block of a row; see ``kernels``.

Offsets are 64-bit throughout: a row, and a batch, may have more than 2**31 elements.

One file: the kernels over images share the way they walk over a row.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from ima_seg.ops import philox as spec

KEY_A, KEY_B = tl.constexpr(spec.WEYL[0]), tl.constexpr(spec.WEYL[1])
MULTIPLIER_A, MULTIPLIER_B = tl.constexpr(spec.MULTIPLIERS[0]), tl.constexpr(spec.MULTIPLIERS[1])
ROUNDS = tl.constexpr(spec.ROUNDS)
NOISE, SHARE = tl.constexpr(spec.NOISE), tl.constexpr(spec.SHARE)


@triton.jit
def _places(block, BLOCK: tl.constexpr):
    """Places of a block's elements in its row, int64."""
    return (tl.zeros([BLOCK], tl.int64) + block) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _gradient(gradient, mask, offsets, inside, MASKED: tl.constexpr):
    value = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        value = tl.where(tl.load(mask + offsets, mask=inside, other=0) != 0, value, 0.0)
    return value


@triton.jit
def _clamped(value, radius):
    """``value`` within the radius; NaN stays NaN."""
    return tl.where(value == value, tl.maximum(tl.minimum(value, radius), -radius), value)


@triton.jit
def _boxed(stepped, image, offsets, inside, low, high):
    value = tl.load(image + offsets, mask=inside, other=0.0).to(tl.float32)
    least, most = tl.minimum(low - value, 0.0), tl.maximum(high - value, 0.0)
    return tl.where(stepped == stepped, tl.maximum(tl.minimum(stepped, most), least), stepped)


@triton.jit
def step_sums(
    delta, gradient, mask, partial, size, delta_row, gradient_row, mask_row, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Partial sums of g g, d g and d d."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    delta += row * delta_row
    gradient += row * gradient_row
    mask += row * mask_row
    gg, dg, dd = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for block in range(part, tl.cdiv(size, BLOCK), parts):
        offsets = _places(block, BLOCK)
        inside = offsets < size
        d = tl.load(delta + offsets, mask=inside, other=0.0).to(tl.float32)
        g = _gradient(gradient, mask, offsets, inside, MASKED)
        gg += g * g
        dg += d * g
        dd += d * d
    partial += (row * parts + part) * 3
    tl.store(partial, tl.sum(gg))
    tl.store(partial + 1, tl.sum(dg))
    tl.store(partial + 2, tl.sum(dd))


@triton.jit
def l2_step(
    delta, gradient, out, mask, image, partial, alpha, eps, low, high, length, size,
    delta_row, gradient_row, out_row, mask_row, image_row,
    BOXED: tl.constexpr, MASKED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of known length, shrunk onto the ball: ``shrink * d + gain * g``."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    lanes = tl.arange(0, PARTS)
    sums = partial + (row * parts + lanes) * 3
    gg = tl.sum(tl.load(sums, mask=lanes < parts, other=0.0))
    dg = tl.sum(tl.load(sums + 1, mask=lanes < parts, other=0.0))
    dd = tl.sum(tl.load(sums + 2, mask=lanes < parts, other=0.0))
    voxels = size * 1.0
    rms = tl.sqrt(gg / voxels)
    usable = (rms > 0) & (rms < float("inf"))
    radius = tl.load(eps + row)
    gain = tl.where(usable, tl.load(alpha + row) / rms, 0.0)
    after = dd + tl.where(usable, gain * (2 * dg + gain * gg), 0.0)
    moved = tl.sqrt(tl.maximum(after, 0.0) / voxels)
    shrink = tl.where(moved > radius, radius / moved, 1.0)
    gain *= shrink
    if part == 0:
        tl.store(length + row, rms)
    least, most = tl.load(low + row), tl.load(high + row)
    delta += row * delta_row
    gradient += row * gradient_row
    out += row * out_row
    mask += row * mask_row
    image += row * image_row
    for block in range(part, tl.cdiv(size, BLOCK), parts):
        offsets = _places(block, BLOCK)
        inside = offsets < size
        d = tl.load(delta + offsets, mask=inside, other=0.0).to(tl.float32)
        g = _gradient(gradient, mask, offsets, inside, MASKED)
        stepped = shrink * d + tl.where(usable, gain * g, 0.0)
        if BOXED:
            stepped = _boxed(stepped, image, offsets, inside, least, most)
        tl.store(out + offsets, stepped.to(out.dtype.element_ty), mask=inside)


@triton.jit
def linf_step(
    delta, gradient, out, mask, image, partial, alpha, eps, low, high, size,
    delta_row, gradient_row, out_row, mask_row, image_row,
    BOXED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step, as if the gradient were finite, and what tells whether it was: largest value, and how many are not."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    radius, step = tl.load(eps + row), tl.load(alpha + row)
    least, most = tl.load(low + row), tl.load(high + row)
    delta += row * delta_row
    gradient += row * gradient_row
    out += row * out_row
    mask += row * mask_row
    image += row * image_row
    largest, broken = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for block in range(part, tl.cdiv(size, BLOCK), parts):
        offsets = _places(block, BLOCK)
        inside = offsets < size
        d = tl.load(delta + offsets, mask=inside, other=0.0).to(tl.float32)
        g = _gradient(gradient, mask, offsets, inside, MASKED)
        finite = tl.abs(g) < float("inf")
        largest = tl.maximum(largest, tl.where(finite, tl.abs(g), 0.0))
        broken += tl.where(finite, 0.0, 1.0)
        sign = tl.where(g > 0, 1.0, 0.0) - tl.where(g < 0, 1.0, 0.0)
        stepped = _clamped(d + step * sign, radius)
        if BOXED:
            stepped = _boxed(stepped, image, offsets, inside, least, most)
        tl.store(out + offsets, stepped.to(out.dtype.element_ty), mask=inside)
    partial += (row * parts + part) * 3
    tl.store(partial, tl.max(largest))
    tl.store(partial + 1, tl.sum(broken))


@triton.jit
def linf_finish(
    delta, out, image, partial, eps, low, high, length, size, delta_row, out_row, image_row,
    BOXED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes back the step of the rows whose gradient was not finite; for all others nothing but their parts is read."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    lanes = tl.arange(0, PARTS)
    sums = partial + (row * parts + lanes) * 3
    largest = tl.max(tl.load(sums, mask=lanes < parts, other=0.0))
    broken = tl.sum(tl.load(sums + 1, mask=lanes < parts, other=0.0))
    if part == 0:
        tl.store(length + row, tl.where(broken > 0, float("nan"), largest))
    if broken > 0:
        radius = tl.load(eps + row)
        least, most = tl.load(low + row), tl.load(high + row)
        delta += row * delta_row
        out += row * out_row
        image += row * image_row
        for block in range(part, tl.cdiv(size, BLOCK), parts):
            offsets = _places(block, BLOCK)
            inside = offsets < size
            d = tl.load(delta + offsets, mask=inside, other=0.0).to(tl.float32)
            kept = _clamped(d, radius)
            if BOXED:
                kept = _boxed(kept, image, offsets, inside, least, most)
            tl.store(out + offsets, kept.to(out.dtype.element_ty), mask=inside)


@triton.jit
def interpolate(
    inner, outer, out, partial, share, size, inner_row, outer_row, out_row, L2: tl.constexpr, BLOCK: tl.constexpr
):
    """Points between, and their partial sums of squares (l2) or largest values (linf)."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    weight = tl.load(share + row)
    inner += row * inner_row
    outer += row * outer_row
    out += row * out_row
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(part, tl.cdiv(size, BLOCK), parts):
        offsets = _places(block, BLOCK)
        inside = offsets < size
        a = tl.load(inner + offsets, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(outer + offsets, mask=inside, other=0.0).to(tl.float32)
        # Exact at both ends, as torch.lerp.
        point = tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))
        if L2:
            total += point * point
        else:
            total = tl.maximum(total, tl.where(point == point, tl.abs(point), float("inf")))
        tl.store(out + offsets, point.to(out.dtype.element_ty), mask=inside)
    tl.store(partial + row * parts + part, tl.sum(total) if L2 else tl.max(total))


@triton.jit
def _philox(seed, counters, STREAM: tl.constexpr):
    """Four 32-bit words for each of ``counters`` (int64); :func:`ima_seg.ops.philox.philox`."""
    a, b = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    c, d = tl.zeros_like(a) + STREAM, tl.zeros_like(a)
    c, d = c.to(tl.uint32), d.to(tl.uint32)
    key_a = tl.zeros_like(a) + seed.to(tl.uint32)
    key_b = tl.zeros_like(a) + (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        first = a.to(tl.uint64) * MULTIPLIER_A
        second = c.to(tl.uint64) * MULTIPLIER_B
        a, b, c, d = (
            (second >> 32).to(tl.uint32) ^ b ^ key_a,
            second.to(tl.uint32),
            (first >> 32).to(tl.uint32) ^ d ^ key_b,
            first.to(tl.uint32),
        )
        key_a = (key_a.to(tl.uint64) + KEY_A).to(tl.uint32)
        key_b = (key_b.to(tl.uint64) + KEY_B).to(tl.uint32)
    return a, b, c, d


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23


@triton.jit
def _values(seed, counters, L2: tl.constexpr):
    """Four values for each counter: standard normal (L2), or uniform in (-1, 1)."""
    a, b, c, d = _philox(seed, counters, NOISE)
    a, b, c, d = _uniform(a), _uniform(b), _uniform(c), _uniform(d)
    if L2:
        first, second = tl.sqrt(-2 * tl.log(a)), tl.sqrt(-2 * tl.log(c))
        turn, other = 6.283185307179586 * b, 6.283185307179586 * d
        a, b, c, d = first * tl.cos(turn), first * tl.sin(turn), second * tl.cos(other), second * tl.sin(other)
    else:
        a, b, c, d = 2 * a - 1, 2 * b - 1, 2 * c - 1, 2 * d - 1
    return a, b, c, d


@triton.jit
def _kept(value, mask, offsets, size, MASKED: tl.constexpr):
    """``value``, zero outside the row and the mask."""
    inside = offsets < size
    if MASKED:
        inside = inside & (tl.load(mask + offsets, mask=inside, other=0) != 0)
    return tl.where(inside, value, 0.0)


@triton.jit
def noise_sums(mask, seeds, partial, size, mask_row, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Partial sums of squares of Gaussian noise that is not stored: it is cheaper to make again than to read."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    seed = tl.load(seeds + row)
    mask += row * mask_row
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(part, tl.cdiv(size, 4 * BLOCK), parts):
        counters = _places(block, BLOCK)
        a, b, c, d = _values(seed, counters, True)
        a = _kept(a, mask, 4 * counters, size, MASKED)
        b = _kept(b, mask, 4 * counters + 1, size, MASKED)
        c = _kept(c, mask, 4 * counters + 2, size, MASKED)
        d = _kept(d, mask, 4 * counters + 3, size, MASKED)
        total += a * a + b * b + c * c + d * d
    tl.store(partial + row * parts + part, tl.sum(total))


@triton.jit
def noise(
    out, mask, seeds, partial, radius, size, out_row, mask_row,
    L2: tl.constexpr, MASKED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The noise, scaled."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    seed = tl.load(seeds + row)
    scale = tl.load(radius + row)
    if L2:
        lanes = tl.arange(0, PARTS)
        square = tl.sum(tl.load(partial + row * parts + lanes, mask=lanes < parts, other=0.0))
        share, _, _, _ = _philox(seed, tl.zeros([1], tl.int64), SHARE)
        scale = scale * tl.sum(_uniform(share))
        rms = tl.sqrt(square / (size * 1.0))
        scale = tl.where(rms > 0, scale / rms, 0.0)
    out += row * out_row
    mask += row * mask_row
    for block in range(part, tl.cdiv(size, 4 * BLOCK), parts):
        counters = _places(block, BLOCK)
        a, b, c, d = _values(seed, counters, L2)
        _store(out, scale * _kept(a, mask, 4 * counters, size, MASKED), 4 * counters, size)
        _store(out, scale * _kept(b, mask, 4 * counters + 1, size, MASKED), 4 * counters + 1, size)
        _store(out, scale * _kept(c, mask, 4 * counters + 2, size, MASKED), 4 * counters + 2, size)
        _store(out, scale * _kept(d, mask, 4 * counters + 3, size, MASKED), 4 * counters + 3, size)


@triton.jit
def _store(out, value, offsets, size):
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=offsets < size)
