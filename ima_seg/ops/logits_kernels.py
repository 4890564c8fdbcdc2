"""Triton kernels over logits (B, K, N) of any strides; a block holds all classes of some voxels. See ``kernels``.

``truth`` is (B, 1, N) class codes (0 ignored, 1 + class, 1 + K none) or, for regions, (B, K, N) bytes; ``known`` is
(B, 1, N) bytes for regions with an ignore label. Offsets are 64-bit throughout.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _voxels(block, BLOCK: tl.constexpr):
    """Places of a block's voxels in its row, (1, BLOCK) int64."""
    return ((tl.zeros([BLOCK], tl.int64) + block) * BLOCK + tl.arange(0, BLOCK))[None, :]


@triton.jit
def _block(
    logits, truth, known, block, size, outputs, logits_class, logits_voxel, truth_class, truth_voxel, known_voxel,
    REGIONS: tl.constexpr, KNOWN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a block has logits, its logits, which (class, voxel) are true, which voxels count, which have a class."""
    voxels, classes = _voxels(block, BLOCK), tl.arange(0, OUTPUTS)[:, None]
    inside = voxels < size
    whole = inside & (classes < outputs)
    offsets = classes.to(tl.int64) * logits_class + voxels * logits_voxel
    x = tl.load(logits + offsets, mask=whole, other=float("-inf")).to(tl.float32)
    if REGIONS:
        places = classes.to(tl.int64) * truth_class + voxels * truth_voxel
        true = tl.load(truth + places, mask=whole, other=0) != 0
        counted = inside
        if KNOWN:
            counted = inside & (tl.load(known + voxels * known_voxel, mask=inside, other=0) != 0)
        classed = counted
    else:
        code = tl.load(truth + voxels * truth_voxel, mask=inside, other=0).to(tl.int32)
        counted = code != 0
        classed = counted & (code <= outputs)
        true = classed & (classes + 1 == code)
    return whole, x, true, counted, classed


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _softmax(x):
    """The softmax over classes, and the logarithm of the sum of exponentials."""
    top = tl.max(x, 0)[None, :]
    top = tl.where(top == float("-inf"), 0.0, top)  # lanes that hold no voxel
    e = tl.exp(x - top)
    total = tl.sum(e, 0)[None, :]
    return e / total, top + tl.log(total)


@triton.jit
def dice_ce_sums(
    logits, truth, known, partial, scalars, size, outputs,
    logits_row, logits_class, logits_voxel, truth_row, truth_class, truth_voxel, known_row, known_class, known_voxel,
    REGIONS: tl.constexpr, KNOWN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums per class of p t, p and t; cross-entropy and voxels that count."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    logits += row * logits_row
    truth += row * truth_row
    known += row * known_row
    hit = tl.zeros([OUTPUTS], tl.float32)
    predicted, real = hit, hit
    entropy, voxels = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for block in range(part, tl.cdiv(size, BLOCK), parts):
        whole, x, true, counted, classed = _block(
            logits, truth, known, block, size, outputs, logits_class, logits_voxel, truth_class, truth_voxel,
            known_voxel, REGIONS, KNOWN, OUTPUTS, BLOCK,
        )  # fmt: skip
        if REGIONS:
            x = tl.where(whole, x, 0.0)
            p = _sigmoid(x)
            # softplus(x) - x t without overflow
            each = tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x))) - tl.where(true, x, 0.0)
            entropy += tl.sum(tl.where(whole & counted, each, 0.0), 0)
        else:
            p, normaliser = _softmax(x)
            at_truth = tl.sum(tl.where(true, x, 0.0), 0)[None, :]
            entropy += tl.sum(tl.where(classed, normaliser - at_truth, 0.0), 0)
        p = tl.where(whole & counted, p, 0.0)
        hit += tl.sum(tl.where(true, p, 0.0), 1)
        predicted += tl.sum(p, 1)
        real += tl.sum(true.to(tl.float32), 1)
        voxels += tl.sum(counted.to(tl.float32), 0)
    classes = tl.arange(0, OUTPUTS)
    place = partial + ((row * parts + part) * outputs + classes) * 3
    tl.store(place, hit, mask=classes < outputs)
    tl.store(place + 1, predicted, mask=classes < outputs)
    tl.store(place + 2, real, mask=classes < outputs)
    tl.store(scalars + (row * parts + part) * 2, tl.sum(entropy))
    tl.store(scalars + (row * parts + part) * 2 + 1, tl.sum(voxels))


@triton.jit
def dice_ce_finish(
    partial, scalars, loss, sums, voxels, parts, outputs, smooth,
    OUTPUTS: tl.constexpr, REGIONS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a row up and makes its loss of them."""
    row = tl.program_id(0).to(tl.int64)
    classes = tl.arange(0, OUTPUTS)
    within = classes < outputs
    hit = tl.zeros([OUTPUTS], tl.float32)
    predicted, real = hit, hit
    entropy, counted = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for first_part in range(0, parts, CHUNK):
        lanes = row * 0 + first_part + tl.arange(0, CHUNK)
        there = lanes < parts
        place = partial + ((row * parts + lanes[:, None]) * outputs + classes[None, :]) * 3
        both = there[:, None] & within[None, :]
        hit += tl.sum(tl.load(place, mask=both, other=0.0), 0)
        predicted += tl.sum(tl.load(place + 1, mask=both, other=0.0), 0)
        real += tl.sum(tl.load(place + 2, mask=both, other=0.0), 0)
        entropy += tl.load(scalars + (row * parts + lanes) * 2, mask=there, other=0.0)
        counted += tl.load(scalars + (row * parts + lanes) * 2 + 1, mask=there, other=0.0)
    total, voxels_counted = tl.sum(entropy), tl.sum(counted)
    place = sums + (row * outputs + classes) * 3
    tl.store(place, hit, mask=within)
    tl.store(place + 1, predicted, mask=within)
    tl.store(place + 2, real, mask=within)
    tl.store(voxels + row, voxels_counted)
    first = 0 if REGIONS else 1
    dice = (2 * hit + smooth) / (predicted + real + smooth)
    mean = tl.sum(tl.where(within & (classes >= first), dice, 0.0)) / (outputs - first)
    share = total / tl.maximum(voxels_counted, 1.0)
    tl.store(loss + row, (share / outputs if REGIONS else share) - mean)


@triton.jit
def dice_ce_gradient(
    logits, truth, known, out, upstream, sums, voxels, size, outputs, smooth,
    logits_row, logits_class, logits_voxel, truth_row, truth_class, truth_voxel, known_row, known_class, known_voxel,
    out_row, out_class, out_voxel,
    REGIONS: tl.constexpr, KNOWN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the loss, in one pass; formulas as in the reference."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    classes = tl.arange(0, OUTPUTS)
    within = classes < outputs
    place = sums + (row * outputs + classes) * 3
    hit = tl.load(place, mask=within, other=0.0)
    predicted = tl.load(place + 1, mask=within, other=0.0)
    real = tl.load(place + 2, mask=within, other=0.0)
    factor = tl.load(upstream + row)
    weight = factor / tl.maximum(tl.load(voxels + row), 1.0)
    first = 0 if REGIONS else 1
    denominator = predicted + real + smooth
    share = tl.where(within & (classes >= first), factor / (outputs - first), 0.0)
    push = (share * (2 * hit + smooth) / (denominator * denominator))[:, None]
    pull = (share * 2 / denominator)[:, None]
    logits += row * logits_row
    truth += row * truth_row
    known += row * known_row
    out += row * out_row
    for block in range(part, tl.cdiv(size, BLOCK), parts):
        whole, x, true, counted, classed = _block(
            logits, truth, known, block, size, outputs, logits_class, logits_voxel, truth_class, truth_voxel,
            known_voxel, REGIONS, KNOWN, OUTPUTS, BLOCK,
        )  # fmt: skip
        slope = push - tl.where(true, pull, 0.0)
        if REGIONS:
            p = _sigmoid(tl.where(whole, x, 0.0))
            gradient = p * (1 - p) * slope + (p - true.to(tl.float32)) * (weight / outputs)
        else:
            p, _ = _softmax(x)
            p = tl.where(whole, p, 0.0)
            gradient = p * (slope - tl.sum(p * slope, 0)[None, :])
            gradient += tl.where(classed, p - true.to(tl.float32), 0.0) * weight
        gradient = tl.where(counted, gradient, 0.0)
        offsets = tl.arange(0, OUTPUTS)[:, None].to(tl.int64) * out_class
        offsets += _voxels(block, BLOCK) * out_voxel
        tl.store(out + offsets, gradient.to(out.dtype.element_ty), mask=whole)


@triton.jit
def hard_counts(
    logits, truth, known, partial, checks, size, outputs,
    logits_row, logits_class, logits_voxel, truth_row, truth_class, truth_voxel, known_row, known_class, known_voxel,
    REGIONS: tl.constexpr, KNOWN: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial counts per class of voxels hit, predicted and true, and the largest of all logits, finite if they are."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = row * 0 + size  # 64-bit, so that its blocks are
    logits += row * logits_row
    truth += row * truth_row
    known += row * known_row
    hit = tl.zeros([OUTPUTS], tl.int32)
    predicted, real = hit, hit
    largest = tl.zeros([BLOCK], tl.float32)
    for block in range(part, tl.cdiv(size, BLOCK), parts):
        whole, x, true, counted, _ = _block(
            logits, truth, known, block, size, outputs, logits_class, logits_voxel, truth_class, truth_voxel,
            known_voxel, REGIONS, KNOWN, OUTPUTS, BLOCK,
        )  # fmt: skip
        ranked = tl.where(x == x, x, float("-inf"))  # NaN wins over nothing
        chosen = x > 0 if REGIONS else tl.argmax(ranked, 0)[None, :] == tl.arange(0, OUTPUTS)[:, None]
        chosen = chosen & counted & whole
        hit += tl.sum((chosen & true).to(tl.int32), 1)
        predicted += tl.sum(chosen.to(tl.int32), 1)
        real += tl.sum(true.to(tl.int32), 1)
        # The largest, not the sum, which finite logits can make infinite; NaN would be passed over.
        height = tl.where(x == x, tl.abs(x), float("inf"))
        largest = tl.maximum(largest, tl.max(tl.where(whole, height, 0.0), 0))
    classes = tl.arange(0, OUTPUTS)
    place = partial + ((row * parts + part) * outputs + classes) * 3
    tl.store(place, hit, mask=classes < outputs)
    tl.store(place + 1, predicted, mask=classes < outputs)
    tl.store(place + 2, real, mask=classes < outputs)
    tl.store(checks + row * parts + part, tl.max(largest))
