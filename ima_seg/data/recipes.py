"""Recipes: what is known about a data set, one TOML file each.

They lie in the repository's ``datasets`` folder; a wheel carries them in ``ima_seg/data/recipes``.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ima_seg.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdversarialSettings(_Strict):
    """The published 2D experiment on this data set: how large the noise was.

    Sizes are Euclidean norms over one whole patch of so many voxels per axis, all channels, in network units: the cap
    of a case's margin, the step by which margins grow, and the amounts of noise at test, 0 first.
    """

    norm: Literal["l2"]
    patch: tuple[int, int] | tuple[int, int, int]
    eps_max_l2: float = Field(gt=0)
    delta_l2: float = Field(gt=0)
    test_l2: tuple[float, ...] = Field(min_length=1)


class DecathlonSource(_Strict):
    """A task of the Medical Segmentation Decathlon: its folder, the published archive, and what it holds."""

    task: str = Field(pattern=r"^Task\d\d_[A-Za-z0-9]+$")
    archive: str
    md5: str = Field(pattern=r"^[0-9a-f]{32}$")
    training_cases: int = Field(gt=0)
    test_cases: int = Field(ge=0)  # without labels
    channel_names: tuple[str, ...] = Field(min_length=1)
    labels: dict[str, int]


class PhantomSettings(_Strict):
    """Arguments of :func:`ima_seg.data.phantom.write_phantom_dataset` that make a flavour."""

    modality: Literal["mr", "mr2", "ct"]
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    regions: bool = False
    ignore_label: bool = False


class Recipe(_Strict):
    """One data set.

    Attributes:
        name: the recipe's name, that of its file.
        kind: which of the sections ``decathlon`` and ``phantom`` it has.
        title: one line for a table.
        source: where the data come from.
        licence: of the data.
        citation, doi: what to cite, empty for a phantom.
        decathlon, phantom: the section that ``kind`` names; the other is None.
        adversarial: the published settings, if there are any.
    """

    name: str
    kind: Literal["decathlon", "phantom"]
    title: str
    source: str
    licence: str
    citation: str = ""
    doi: str = ""
    decathlon: DecathlonSource | None = None
    phantom: PhantomSettings | None = None
    adversarial: AdversarialSettings | None = None

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        present = [key for key in ("decathlon", "phantom") if getattr(self, key) is not None]
        if present != [self.kind]:
            raise ValueError(f"kind is {self.kind!r}, but the sections are {present}")
        if self.adversarial is not None and self.decathlon is None:
            raise ValueError("the section [adversarial] needs the section [decathlon]")
        return self

    def rms(self, l2: float) -> float:
        """An L2 norm over the published patch, all channels, as RMS per voxel: ``l2 / sqrt(channels * voxels)``.

        Both are in network units (standard deviations under z-scoring).

        Raises:
            UserError: the recipe has no published patch.
        """
        if self.adversarial is None or self.decathlon is None:
            raise UserError(f"recipe {self.name} has no [adversarial] section, so it gives no patch to convert L2 with")
        return l2 / math.sqrt(len(self.decathlon.channel_names) * math.prod(self.adversarial.patch))

    @property
    def eps_max_rms(self) -> float | None:
        """``adversarial.eps_max_l2`` as RMS per voxel; None without published settings."""
        return None if self.adversarial is None else self.rms(self.adversarial.eps_max_l2)

    @property
    def delta_rms(self) -> float | None:
        """``adversarial.delta_l2`` likewise."""
        return None if self.adversarial is None else self.rms(self.adversarial.delta_l2)

    @property
    def test_rms(self) -> tuple[float, ...]:
        """``adversarial.test_l2`` likewise; empty without published settings."""
        return () if self.adversarial is None else tuple(self.rms(value) for value in self.adversarial.test_l2)


def recipe_folder() -> Path:
    """Return the folder that holds the recipes: the wheel's, else the repository's.

    Raises:
        UserError: neither is there.
    """
    here = Path(__file__).resolve()
    for folder in (here.parent / "recipes", here.parents[2] / "datasets"):
        if next(folder.glob("*.toml"), None) is not None:
            return folder
    raise UserError(f"no data set recipes beside {here.parent}: the installation is incomplete, install ima-seg again")


def list_recipes() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


@cache
def load_recipe(name: str) -> Recipe:
    """Read and check one recipe, by a name of :func:`list_recipes`.

    Raises:
        UserError: there is no such recipe, or its file is malformed.
    """
    known = list_recipes()
    if name not in known:
        raise UserError(f"there is no data set recipe {name!r}: use one of {', '.join(known)}")
    return read_recipe(recipe_folder() / f"{name}.toml")


def read_recipe(path: Path) -> Recipe:
    """Read and check the recipe in ``path``.

    Raises:
        UserError: the file is not valid TOML, a key is missing, unknown or ill-typed, or its name is not the file's.
    """
    try:
        recipe = Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe ({error}): repair the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']} (got {first['input']!r}): repair the file") from error
    if recipe.name != path.stem:
        raise UserError(f"{path}: the recipe calls itself {recipe.name!r}: its name must be that of the file")
    return recipe


def flavours() -> dict[str, PhantomSettings]:
    """Return the phantom's named flavours: "mr" stands for the recipe ``phantom_mr``, and so on."""
    phantoms = {name.removeprefix("phantom_"): load_recipe(name).phantom for name in list_recipes()}
    return {name: settings for name, settings in phantoms.items() if settings is not None}


def recipe_of_task(task: str) -> Recipe | None:
    """Return the recipe of a Decathlon task by its folder name, e.g. ``Task04_Hippocampus``, or None."""
    recipes = map(load_recipe, list_recipes())
    return next((recipe for recipe in recipes if recipe.decathlon and recipe.decathlon.task == task), None)
