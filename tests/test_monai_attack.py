"""The attacks as a dictionary transform."""

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss, FocalLoss

from ima_seg import Labels, Target, UserError
from ima_seg.attacks import Problem, pgd
from ima_seg.monai import Attack, AttackBatchd, per_sample
from ima_seg.ops import perturbation_size
from tests.models import TinyUNet
from tests.monai_data import items, loader

OPTIONS = {"steps": 3, "precision": "fp32"}


def make(**options):
    network = TinyUNet(2, outputs=2, batch_norm=True).train()
    return AttackBatchd("image", "label", network, 2, 0.2, **{**OPTIONS, **options})


def test_a_batch_keeps_its_metadata_and_the_network_its_flags():
    attack = make()
    batch = next(iter(loader(items())))
    before = {name: value.clone() for name, value in attack.network.state_dict().items()}
    result = attack(batch)
    image = result["image"]
    assert isinstance(image, MetaTensor) and image.is_batch and image.meta["filename_or_obj"] == \
        batch["image"].meta["filename_or_obj"]  # fmt: skip
    torch.testing.assert_close(
        perturbation_size(image.as_tensor() - batch["image"].as_tensor(), "l2"), torch.full((2,), 0.2)
    )
    assert result["label"] is batch["label"] and result["name"] == batch["name"]
    assert attack.network.training and all(p.grad is None and p.requires_grad for p in attack.network.parameters())
    for name, value in attack.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_it_is_pgd_and_repeats_itself_from_a_random_state():
    attack = make().set_random_state(5)
    batch = next(iter(loader(items())))
    image, y = batch["image"].as_tensor(), batch["label"].as_tensor()
    found = attack(batch)["image"].as_tensor()
    assert torch.equal(found, attack.set_random_state(5)(batch)["image"].as_tensor())
    seed = int(attack.set_random_state(5).R.randint(2**31))
    generator = torch.Generator().manual_seed(seed)
    problem = Problem(
        attack.network, image, Target.from_raw(y, Labels(2)), precision=OPTIONS["precision"], generator=generator
    )
    direct = pgd(problem, 0.2, steps=OPTIONS["steps"]).adversarial
    assert torch.equal(found, direct)


def test_a_single_item_stays_one():
    item = items(1)[0]
    result = make()(item)["image"]
    assert result.shape == (1, 16, 16) and not result.is_batch
    assert result.meta["filename_or_obj"] == item["image"].meta["filename_or_obj"]
    assert not torch.equal(result.as_tensor(), item["image"].as_tensor())
    plain = {key: value.as_tensor() for key, value in item.items() if key != "name"}
    with pytest.raises(UserError, match="batched=True or False"):
        make()(plain)
    assert type(make(batched=False)(plain)["image"]) is torch.Tensor


def test_mistakes_are_explained():
    item = items(1)[0]
    with pytest.raises(UserError, match=r"no reference under the key 'label'.*keys: image, name"):
        make()({key: item[key] for key in ("image", "name")})
    with pytest.raises(UserError, match=r"attack is 'pdg'; the attacks there are: .*pgd"):
        make(attack="pdg")
    with pytest.raises(KeyError):
        make()({"label": item["label"]})
    assert make(allow_missing_keys=True)({"label": item["label"]})["label"] is item["label"]


@pytest.mark.parametrize("name", ["fgsm", "apgd-dice", "square", "gaussian"])
def test_other_attacks_by_name(name):
    batch = next(iter(loader(items())))
    found = make(attack=name)(batch)["image"].as_tensor()
    assert (perturbation_size(found - batch["image"].as_tensor(), "l2") <= 0.2 + 1e-5).all()


def test_losses_per_sample():
    logits, y = torch.randn(3, 2, 4, 4), torch.randint(0, 2, (3, 1, 4, 4))
    focal = FocalLoss(to_onehot_y=True, reduction="none")(logits, y)
    torch.testing.assert_close(per_sample(focal, 3), focal.mean((1, 2, 3)))
    assert per_sample(torch.tensor(2.0), 1).tolist() == [2.0]
    for wrong in (DiceCELoss(softmax=True, to_onehot_y=True)(logits, y), torch.zeros(2), 3.0, {"loss": logits}):
        with pytest.raises(UserError, match="reduction='none'"):
            per_sample(wrong, 3)


def test_a_batch_mean_is_refused_before_it_attacks_anything():
    batch = next(iter(loader(items())))
    attack = Attack(2, loss=DiceCELoss(softmax=True, to_onehot_y=True), **OPTIONS)
    with pytest.raises(UserError, match="one patient would be perturbed to harm another"):
        attack(TinyUNet(2, outputs=2), batch["image"].as_tensor(), batch["label"].as_tensor(), 0.1)
