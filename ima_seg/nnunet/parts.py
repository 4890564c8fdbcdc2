"""The parts that plans name, looked up as nnU-Net does: there, of the right kind, and tried before a case is read."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ima_seg.errors import UserError
from ima_seg.nnunet.compat import find_part, trainer_class
from ima_seg.nnunet.normalisation import KNOWN_SCHEMES

#: Where classes of networks may come from. Any importable name would let a model folder run what it likes.
_TRUSTED_MODULES = ("dynamic_network_architectures.", "torch.nn.", "nnunetv2.")
#: Resampling is tried on so small an image, onto another grid.
_TRIAL = ((1, 4, 4, 4), (5, 4, 4), (1.0, 1.0, 1.0), (0.8, 1.0, 1.0))


@contextmanager
def _trying(what: str) -> Iterator[None]:
    """Whatever code of others raises becomes one line: ``what`` and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what} ({type(error).__name__}: {reason})") from None


def _not_here(file: Path, what: str, name: str) -> UserError:
    return UserError(
        f"{file} names {name!r} as {what}, which this installation does not have; install the package it comes from"
    )


def _require(file: Path, what: str, name: str, folder: str, base: str) -> None:
    """nnU-Net's lookup of a class in one of its folders; ``base`` is what the class must be."""
    found, kind = find_part(folder, name), find_part(folder, base)
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise _not_here(file, what, name)


def require_reader(plans: Mapping[str, Any], file: Path) -> None:
    """Refuse plans whose reader of images is not there."""
    _require(file, "image_reader_writer", plans["image_reader_writer"], "imageio", "BaseReaderWriter")


def require_parts(plans: Mapping[str, Any], configuration: Mapping[str, Any], file: Path) -> None:
    """Refuse plans with a part that is not there, or resamplings that do not work as they are called.

    Raises:
        UserError: naming ``file``, the key and the part.
    """
    require_reader(plans, file)
    if "label_manager" in plans:
        _require(file, "label_manager", plans["label_manager"], "utilities.label_handling", "LabelManager")
    preprocessor = configuration["preprocessor_name"]
    _require(file, "preprocessor_name", preprocessor, "preprocessing", "DefaultPreprocessor")
    for scheme in configuration["normalization_schemes"]:
        _require(file, "normalisation", scheme, "preprocessing.normalization", "ImageNormalization")
        if scheme not in KNOWN_SCHEMES:
            raise UserError(
                f"{file} normalises with {scheme!r}, which is not known to ima-seg, so perturbations have no unit; "
                f"known are: {', '.join(KNOWN_SCHEMES)}"
            )
    for key in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        name, options = configuration[key], configuration[f"{key}_kwargs"]
        resample = find_part("preprocessing.resampling", name)
        if not (inspect.isfunction(resample) and resample.__module__.startswith("nnunetv2.")):
            raise _not_here(file, key, name)
        shape, *grids = _TRIAL
        with _trying(f"{file}: {key} {name!r} fails with {key}_kwargs {str(options)[:200]}; correct them"):
            resample(np.zeros(shape, np.float32), *grids, **options)


def check_architecture(configuration: Any, file: Path, *, trust: bool) -> None:
    """Refuse a network that is not there or, without ``trust``, not of the packages that networks come from."""
    arguments = configuration.network_arch_init_kwargs
    imported = configuration.network_arch_init_kwargs_req_import
    named = [arguments[key] for key in imported if arguments.get(key)]
    for name in [configuration.network_arch_class_name, *named]:
        with _trying(f"{file} names {name!r} as a part of the network, which cannot be imported"):
            found = _locate(name, trust=trust)
            if name == configuration.network_arch_class_name and found is None:
                # nnU-Net looks there for what has moved.
                found = find_part("architectures", name.rpartition(".")[2], package="dynamic_network_architectures")
        if found is None:
            raise _not_here(file, "a part of the network", name)
        is_network = inspect.isclass(found) and issubclass(found, nn.Module)
        if not trust and not (is_network and found.__module__.startswith(_TRUSTED_MODULES)):
            raise _untrusted(file, name)


def _locate(name: str, *, trust: bool) -> Any:
    # To locate is to import.
    return pydoc.locate(name) if trust or name.startswith(_TRUSTED_MODULES) else _Untrusted


class _Untrusted:
    """In the place of what is not even imported."""


def _untrusted(file: Path, name: str) -> UserError:
    modules = ", ".join(module.rstrip(".") for module in _TRUSTED_MODULES)
    return UserError(
        f"{file} names {name!r} as a part of the network, which is no module of {modules}; if you trust its origin, "
        "install it and pass --trust-checkpoint"
    )


def network_builder(
    manager: Any, configuration: Any, dataset_json: dict[str, Any], *, trainer: str, checkpoint: Path, file: Path
) -> tuple[Callable[[], nn.Module], nn.Module]:
    """A function that builds the network of a model as its trainer does, and a sketch of what it builds.

    The sketch has shapes, but no memory behind them. It has taken a patch.

    Raises:
        UserError: the trainer is not there, or plans and data set do not make a network.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    found = trainer_class(trainer)
    if found is None:
        raise UserError(
            f"{checkpoint} was trained by {trainer}, which this installation does not have; install the package it "
            "comes from or name its folder in nnUNet_extTrainer"
        )
    with _trying(f"{file} does not go with its dataset.json"):
        heads = int(manager.get_label_manager(dataset_json).num_segmentation_heads)
        inputs = int(determine_num_input_channels(manager, configuration, dataset_json))

    def build() -> nn.Module:
        network: nn.Module = found.build_network_architecture(manager, configuration, inputs, heads, False)
        return network

    with _trying(f"the network that {file} describes cannot be used; correct its architecture or patch_size"):
        return build, _sketch(build, inputs, (heads, *configuration.patch_size))


def _sketch(build: Callable[[], nn.Module], inputs: int, expected: tuple[int, ...]) -> nn.Module:
    try:
        with torch.device("meta"), torch.no_grad():
            network = build().eval()
            output = network(torch.empty(1, inputs, *expected[1:]))
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        return build()  # some networks compute with numbers while they are built
    if isinstance(output, torch.Tensor) and tuple(output.shape[1:]) != expected:
        raise ValueError(f"it gives {tuple(output.shape[1:])} of a patch, not {expected}")
    return network
