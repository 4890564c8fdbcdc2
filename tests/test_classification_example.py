import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ima_seg import Classes, UserError

FILE = Path(__file__).parents[1] / "examples" / "classification.py"


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("classification_example", FILE)
    module = sys.modules["classification_example"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_medmnist(path, shape, labels):
    generator = np.random.default_rng(0)
    parts = {"train": 12, "val": 3, "test": 6}
    arrays = {f"{part}_images": generator.integers(0, 255, (n, *shape), np.uint8) for part, n in parts.items()}
    arrays |= {
        f"{part}_labels": np.resize(np.array(labels, np.uint8), (n, len(labels[0]))) for part, n in parts.items()
    }
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize(
    ("shape", "labels", "image", "classes"),
    [
        ((28, 28), [[0], [1], [2]], (1, 28, 28), Classes(3)),
        ((28, 28, 3), [[0], [1]], (3, 28, 28), Classes(2)),
        ((28, 28, 28), [[0], [1]], (1, 28, 28, 28), Classes(2)),
        ((28, 28), [[0, 1, 1], [1, 0, 0]], (1, 28, 28), Classes(3, multilabel=True)),
    ],
)
def test_medmnist_files_are_read(example, tmp_path, shape, labels, image, classes):
    arrays = write_medmnist(tmp_path / "a.npz", shape, labels)
    train, test, found = example.medmnist(tmp_path / "a.npz", None)
    assert found == classes and train.images.shape == (12, *image) and test.images.shape == (6, *image)
    assert abs(train.images.mean()) < 1e-4 and abs(train.images.std() - 1) < 1e-4
    assert np.array_equal(train.answers.view(12, -1).numpy(), arrays["train_labels"])
    assert len(example.medmnist(tmp_path / "a.npz", 5)[0].images) == 5


def test_files_that_are_none_of_medmnist_are_named(example, tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match=r"a.npz has no 'train_labels'; it holds train_images"):
        example.medmnist(tmp_path / "a.npz", None)
    (tmp_path / "b.npz").write_text("text")
    for name in ("b.npz", "c.npz"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            example.medmnist(tmp_path / name, None)


@pytest.mark.parametrize("dims", [2, 3])
def test_phantoms_follow_from_the_seed(example, dims):
    once, again = (example.phantoms(dims, 9, 0.3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(once.images, again.images) and once.answers.bincount().tolist() == [3, 3, 3]
    flat = once.images.flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(9), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.std(1), torch.ones(9))


def test_both_networks_are_trained_and_attacked(example, tmp_path, monkeypatch, capsys):
    output = tmp_path / "numbers.json"
    options = ["--count", "24", "--epochs", "2", "--eps", "0.05", "0.5", "--test", "12", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["classification.py", *options])
    example.main()
    rows = json.loads(output.read_text())["accuracy"]
    assert list(rows) == ["standard", "IMA"] and capsys.readouterr().out.splitlines()[0].split() == [
        "eps", "0", "0.05", "0.5"
    ]  # fmt: skip
    for row in rows.values():
        assert 1 >= row["0"] >= row["0.05"] >= row["0.5"] == 0
