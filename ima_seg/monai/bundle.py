"""A MONAI bundle, ready to be attacked: network, inferer, pre- and post-processing, and what its outputs mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ima_seg.cases.raw import CaseFiles
from ima_seg.errors import UserError
from ima_seg.monai.config import data_format, is_single_ct, load_parts, read_metadata
from ima_seg.monai.model import LoadedBundle
from ima_seg.monai.steps import Output, check_steps, image_key, output_of
from ima_seg.types import Labels
from ima_seg.weights import load_tensors, strip_prefixes

if TYPE_CHECKING:  # it imports MONAI, which takes seconds
    from ima_seg.monai.case import BundleCase

#: Under which a checkpoint may hold the weights, beside lying there openly.
_KEYS = ("model", "network", "state_dict", "model_state_dict", "net")


class BundleModel(LoadedBundle):
    """A bundle that prepares its cases; see :class:`LoadedBundle` for the rest."""

    def prepare(self, files: CaseFiles, *, device: torch.device | str | None = None) -> BundleCase:
        """Read and pre-process a case; the device is that of the network."""
        from ima_seg.monai.case import prepare_case

        return prepare_case(self, files)

    def training_cases(self, images: Path) -> dict[str, str] | None:
        """Nothing in a bundle tells."""
        return None


def load_bundle(
    folder: str | Path,
    *,
    checkpoint: str | None = None,
    labels: Mapping[str, Sequence[int]] | None = None,
    output: Output | None = None,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> BundleModel:
    """Load a bundle for inference, as ``monai.bundle run`` with its inference config does.

    Args:
        folder: holds ``configs`` and ``models``.
        checkpoint: file name in ``models``; default: what the config's CheckpointLoader reads, else ``model.pt``.
        labels: class -> its values in the label files and in what the bundle writes; default: class i of the metadata's
            ``channel_def`` has the value i.
        output: how outputs are read; default: by the post-processing.
        device: where to put the network.
        trust: let the config run any code, and read the checkpoint with full unpickling.

    Raises:
        UserError: something is missing or does not fit, or it would run code.
    """
    from ima_seg.monai.inferer import check_inferer

    root, place = Path(folder).resolve(), torch.device(device)
    metadata = read_metadata(root)
    parts = load_parts(root, device=place, trust=trust)
    check_inferer(parts)
    if checkpoint is not None:
        parts = replace(parts, weights=root / "models" / checkpoint)
    elif not trust and not parts.weights.resolve().is_relative_to(root):
        raise UserError(
            f"{parts.config}: the weights are outside the bundle, {parts.weights.resolve()}; name a file of its folder "
            "models with -chk, or copy the bundle with what its links lead to (cp -rL); if you trust it, pass "
            "--trust-checkpoint"
        )
    _load_weights(parts.network, parts.weights, trust=trust)
    parts.network.to(place).eval().requires_grad_(False)
    sigmoid = (output or output_of(parts)) == "sigmoid"
    outputs, classes = _classes(metadata, {name: tuple(v) for name, v in (labels or {}).items()}, root, sigmoid=sigmoid)
    image = data_format(metadata, "inputs", "image")
    count, names = _count(image, root) or 1, image.get("channel_def")
    key = image_key(parts)
    check_steps(parts, channels=count)
    names = names if isinstance(names, dict) else {}
    return BundleModel(
        **vars(parts),
        folder=root,
        title=f"{metadata.get('name') or root.name} {metadata.get('version') or 'without version'}",
        image_key=key,
        labels=Labels(outputs=outputs, regions=sigmoid),
        classes=classes,
        channels=[str(names.get(str(index), f"channel {index}" if count > 1 else "image")) for index in range(count)],
        is_single_ct=is_single_ct(metadata),
    )


def _count(format_: Mapping[str, Any], root: Path) -> int | None:
    """``num_channels`` of an input or output; ``None`` where it is not given."""
    count = format_.get("num_channels")
    if count is not None and (not isinstance(count, int) or count < 1):
        raise UserError(f"{root / 'configs' / 'metadata.json'}: num_channels is {count!r}; it is a number from 1 on")
    return count


def _classes(
    metadata: Mapping[str, Any], given: dict[str, tuple[int, ...]], root: Path, *, sigmoid: bool
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Number of outputs, and foreground class -> label values in their order."""
    format_ = data_format(metadata, "outputs", "pred")
    path = root / "configs" / "metadata.json"
    definition = format_.get("channel_def") or format_.get("label_def")  # both are in use, with the same contents
    if not definition:
        if not given:
            raise UserError(
                f"{path} has no network_data_format.outputs.pred.channel_def; name the classes in the order of the "
                "outputs with --bundle-labels, for example --bundle-labels liver=1 tumour=2"
            )
        names = [*([] if sigmoid else ["background"]), *given]
    else:
        try:
            names = [str(definition[str(index)]) for index in range(len(definition))]
        except (KeyError, TypeError):
            raise UserError(
                f"{path}: channel_def {definition!r} does not name the channels 0, 1, ...; correct it"
            ) from None
    if len(set(names)) != len(names):
        raise UserError(f"{path}: channel_def names a class twice: {', '.join(names)}; correct it")
    count = _count(format_, root)
    if count is not None and count != len(names):
        raise UserError(f"{path}: num_channels is {count}, but the classes are {', '.join(names)}; correct one of them")
    foreground = names if sigmoid else names[1:]
    if given and set(given) != set(foreground):
        raise UserError(
            f"--bundle-labels names {', '.join(given)}, but the classes in {path} are {', '.join(foreground)}"
        )
    if any(not values or 0 in values for values in given.values()):
        raise UserError("--bundle-labels gives a class no value, or 0, which is the background; give it values above 0")
    if given:
        return len(names), {name: given[name] for name in foreground}
    if sigmoid and len(foreground) > 1:
        raise UserError(
            f"{path}: the classes {', '.join(foreground)} may overlap (sigmoid), so their values in the label files "
            "cannot be told; name them, for example --bundle-labels 'tumour core=1,4' 'whole tumour=1,2,4'"
        )
    return len(names), {name: (index,) for index, name in enumerate(foreground, 1)}


def _load_weights(network: nn.Module, file: Path, *, trust: bool) -> None:
    if not file.is_file():
        remedy = "download the bundle with its weights, or name a file in models with -chk"
        raise UserError(f"{file} does not exist; {remedy}")
    state = load_tensors(file, trust=trust)
    if isinstance(state, dict) and not any(isinstance(value, torch.Tensor) for value in state.values()):
        state = next((state[key] for key in _KEYS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict):
        raise UserError(f"{file} holds {type(state).__name__}, not the weights of a network (a state_dict)")
    if not state.keys() <= network.state_dict().keys():
        state = strip_prefixes(state)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = (str(error).splitlines()[:2] or [""])[-1].strip()[:300]
        message = f"{file} does not fit the network of the bundle's config ({reason}); is it of this bundle?"
        raise UserError(message) from None
