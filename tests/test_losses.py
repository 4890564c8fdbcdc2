import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.types import Labels, Target


def nnunet_loss(labels: Labels):
    if labels.regions:
        return DC_and_BCE_loss(
            {},
            {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False},
            # With an ignore label nnU-Net sums the cross-entropy over regions, without one it takes the mean.
            weight_ce=1 if labels.ignore_label is None else 1 / labels.outputs,
            use_ignore_label=labels.ignore_label is not None,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    return DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        ignore_label=labels.ignore_label,
        dice_class=MemoryEfficientSoftDiceLoss,
    )


@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5)])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_each_sample_has_nnunets_loss_and_gradient(shape, ignore, regions):
    outputs, batch = 3, 4
    labels = Labels(outputs, regions=regions, ignore_label=outputs if ignore else None)
    if regions:
        raw = torch.randint(0, 2, (batch, outputs + ignore, *shape))
    else:
        raw = torch.randint(0, outputs + ignore, (batch, 1, *shape))
    logits = torch.randn(batch, outputs, *shape, dtype=torch.float32, requires_grad=True)
    ours = dice_ce_loss(logits, Target.from_raw(raw, labels))
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    loss = nnunet_loss(labels)
    for i in range(batch):
        one = logits[i : i + 1].detach().requires_grad_(True)
        expected = loss(one, raw[i : i + 1])
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient[i : i + 1], torch.autograd.grad(expected, one)[0], atol=1e-6, rtol=1e-4)


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(1, 2, 64, 64)
    target = Target.from_raw(torch.randint(0, 2, (1, 1, 64, 64)), Labels(2))
    exact = dice_ce_loss(logits.to(torch.bfloat16).float(), target)
    assert dice_ce_loss(logits.to(torch.bfloat16), target).dtype == torch.float32
    torch.testing.assert_close(dice_ce_loss(logits.to(torch.bfloat16), target), exact)


def test_a_sample_ignored_throughout_has_finite_loss_and_no_gradient():
    logits = torch.randn(1, 2, 5, 5, requires_grad=True)
    target = Target.from_raw(torch.full((1, 1, 5, 5), 2), Labels(2, ignore_label=2))
    loss = dice_ce_loss(logits, target).sum()
    loss.backward()
    assert torch.isfinite(loss) and logits.grad.abs().max() == 0


@pytest.mark.parametrize(
    "dtype, classes, ignored", [(torch.uint8, 300, -1), (torch.int8, 200, 5), (torch.uint8, 3, -1)]
)
def test_narrow_label_maps_hold_what_they_say(dtype, classes, ignored):
    raw = torch.tensor([[[0, 1, 2, 5, 127]]]).to(dtype)
    if dtype == torch.uint8:
        raw[0, 0, 3] = 255
    target = Target.from_raw(raw, Labels(classes, ignore_label=ignored))
    values = raw[0, 0].tolist()
    expected = [0 if v == ignored else 1 + v if v < classes else 1 + classes for v in values]
    assert target.reference[0, 0].tolist() == expected
