"""``ima-seg evaluate`` and ``ima-seg report``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ima_seg.errors import UserError, plain

_EVALUATE = """\
Attack models on whole volumes, through the sliding window and the preprocessing that predict them, and write a report:

  ima-seg evaluate -i imagesTs -gt labelsTs -o OUT -m MODEL_FOLDER
  ima-seg evaluate -i imagesTs -gt labelsTs -o OUT --bundle BUNDLE
  ima-seg evaluate -i imagesTs -gt labelsTs -o OUT -d 4 -c 3d_fullres -tr nnUNetTrainer nnUNetTrainerIMA

OUT gets records.jsonl, summary.json, CSV files and report.html.
"""

DEFAULT_ATTACKS = ["ifgsm", "pgd", "apgd-dice", "apgd-ce", "segpgd", "gaussian"]
DEFAULT_EPS = [0.02, 0.05, 0.1, 0.2]


def add_parsers(commands: Any) -> None:
    """Add the two commands to ``commands``, the result of ``add_subparsers``."""
    evaluate = commands.add_parser(
        "evaluate",
        help="attack models on NIfTI volumes and write a robustness report",
        description=_EVALUATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # What is not given has the default of the function or of the settings.
    absent = argparse.SUPPRESS
    data = evaluate.add_argument_group("data")
    alone = "without -gt: a dataset.json that names files (default: the model's)"
    images = f"folder of images, CASE_0000.nii.gz; bundles: or CASE.nii.gz; {alone}"
    data.add_argument("-i", dest="images", help=images)
    data.add_argument("-gt", dest="labels", help="folder of labels, CASE.nii.gz")
    data.add_argument("-o", dest="output", type=Path, metavar="OUT", help="folder to write to")
    data.add_argument("--limit", type=int, metavar="N", help="at most so many cases")
    model = evaluate.add_argument_group("models, as nnUNetv2_predict takes them; the first is the reference")
    of_models = {"dest": "models", "action": "append", "type": Path}
    model.add_argument("-m", metavar="MODEL_FOLDER", help="repeatable", **of_models)
    model.add_argument("--bundle", metavar="DIR", help="a MONAI bundle; repeatable", **of_models)
    model.add_argument("--name", dest="names", action="append", metavar="NAME", help="in the report, one per model")
    model.add_argument("-d", dest="dataset", help="id or name, instead of -m")
    model.add_argument("-c", dest="configuration")
    model.add_argument("-tr", dest="trainers", nargs="+", default=["nnUNetTrainer"], metavar="TRAINER")
    model.add_argument("-p", dest="plans", default="nnUNetPlans")
    model.add_argument("-f", dest="folds", nargs="+", metavar="FOLD", help="folds to average (default: all there are)")
    where = "in each fold, or in a bundle's models (default: checkpoint_final.pth; model.pt)"
    model.add_argument("-chk", dest="checkpoint", metavar="FILE", help=where)
    values = "of bundles: values of each class in the label files (default: by the channels of the metadata)"
    model.add_argument("--bundle-labels", nargs="+", default=[], metavar="CLASS=V[,V]", help=values)
    reading = "of bundles: how outputs are read (default: by the post-processing)"
    model.add_argument("--bundle-output", choices=["softmax", "sigmoid"], help=reading)
    model.add_argument("-prev_stage_predictions", dest="previous_stage", metavar="FOLDER", help="of a cascade")
    model.add_argument("-step_size", type=float, default=absent, help="of the sliding window (default: 0.5)")
    tta = "no mirroring, neither attacked nor predicted"
    model.add_argument("--disable_tta", dest="mirroring", action="store_false", help=tta)
    trust = "load checkpoints, plans and bundles that execute code"
    model.add_argument("--trust-checkpoint", dest="trust", action="store_true", help=trust)
    attack = evaluate.add_argument_group("attacks", argument_default=absent)
    names = "default: ifgsm pgd apgd-dice apgd-ce segpgd gaussian; 'list' shows all"
    attack.add_argument("--attack", dest="attacks", nargs="*", default=DEFAULT_ATTACKS, metavar="NAME", help=names)
    attack.add_argument("--norm", choices=["l2", "linf"], default="l2")
    attack.add_argument("--eps", type=float, nargs="+", help="budgets (default: 0.02 0.05 0.1 0.2 rms)")
    attack.add_argument(
        "--unit", choices=["rms", "l2", "linf", "hu", "percent"],
        help="of --eps: rms, linf: per voxel in SD of its input; l2: of the whole volume or slice; hu, percent "
        "(of the 0.5-99.5 percentile range): original intensities (default: rms with l2, linf with linf)",
    )  # fmt: skip
    attack.add_argument("--budget", choices=["volume", "slice"], help="slice: 2D models only (default: volume)")
    attack.add_argument("--steps", type=int, help="gradient steps (default: 20)")
    attack.add_argument("--restarts", type=int, help="random starts; the worst counts (default: 1)")
    attack.add_argument("--seed", type=int)
    attack.add_argument("--target", dest="targets", nargs="+", metavar="CLASS", help="of disappear, appear")
    names = "natural corruptions; without a name those that fit the modality, 'list' shows all"
    attack.add_argument("--corruption", dest="corruptions", nargs="*", metavar="NAME", help=names)
    attack.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="of the attacks (default: auto)")
    report = evaluate.add_argument_group("metrics and files", argument_default=absent)
    tolerance = "of the surface Dice (default: 2)"
    report.add_argument("--nsd-tolerance", dest="nsd_tolerance_mm", type=float, metavar="MM", help=tolerance)
    broken = "a case is broken below this share of its clean Dice (default: 0.5)"
    report.add_argument("--broken-below", type=float, metavar="SHARE", help=broken)
    report.add_argument("--save-adversarial", action="store_true", help="write adversarial and difference images")
    running = evaluate.add_argument_group("running", argument_default=absent)
    running.add_argument("-device", help="cuda, cpu or mps (default: cuda); torchrun: one rank per GPU")
    running.add_argument("--tile-batch", type=int, metavar="N", help="tiles at once (default: training's batch size)")
    running.add_argument("--resume", action="store_true", help="go on where an interrupted evaluation stopped")
    running.add_argument("-num_parts", type=int, help="for job arrays: number of calls (default: 1)")
    running.add_argument("-part_id", type=int, help="which of them this is, from 0 (default: 0)")
    evaluate.set_defaults(run=_evaluate)

    rebuild = commands.add_parser("report", help="make report.html anew, from one or more output folders of evaluate")
    rebuild.add_argument("folders", nargs="+", type=Path, metavar="OUT")
    rebuild.add_argument("-o", dest="output", type=Path, metavar="FOLDER", help="default: the first folder")
    rebuild.set_defaults(run=_report)


#: Arguments of ``evaluate`` that are no settings: they do not change what is found.
_RUNNING = (
    "folds", "checkpoint", "previous_stage", "device", "tile_batch", "resume", "num_parts", "part_id", "trust",
)  # fmt: skip


def _evaluate(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    if ["list"] in (given["attacks"], given.get("corruptions")):
        _list(given["attacks"] == ["list"])
        return 0
    if arguments.output is None:
        raise UserError("-o is missing; see ima-seg evaluate --help")
    unit = given.setdefault("unit", "rms" if arguments.norm == "l2" else "linf")
    if "eps" not in given and unit not in ("rms", "linf"):
        raise UserError(f"--unit {unit} needs --eps: there are no defaults in that unit")
    given.setdefault("eps", DEFAULT_EPS)
    # nnU-Net warns about variables that only its training needs.
    for name in ("raw", "preprocessed", "results"):
        os.environ.setdefault(f"nnUNet_{name}", "")
    # Of libraries that import torch's scripting; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")
    from ima_seg.evaluate.api import evaluate
    from ima_seg.evaluate.attack.corruptions import default_corruptions
    from ima_seg.evaluate.measure.collect import read_run
    from ima_seg.evaluate.records import explained
    from ima_seg.evaluate.run import EvaluationSettings

    models = _models(arguments)
    if given.get("corruptions") == []:
        given["corruptions"] = default_corruptions(_modality(next(iter(models.values()))))
    given["bundle_labels"] = _label_values(arguments.bundle_labels)
    with explained("", "see ima-seg evaluate --help", named=_option):
        settings = EvaluationSettings(**{k: given[k] for k in given if k in EvaluationSettings.model_fields})
    report, failed = evaluate(
        models,
        arguments.images,
        arguments.labels,
        arguments.output,
        settings,
        command=shlex.join(["ima-seg", *sys.argv[1:]]),
        **{name: given[name] for name in given if name in _RUNNING},
    )
    if report is not None:
        print(f"wrote {plain(report)}")
    elif int(os.environ.get("RANK", "0")) == 0:
        print(f"this part is done; when all are: ima-seg report {shlex.quote(str(arguments.output))}")
    if failed:
        total = len(read_run(arguments.output).cases)
        where = f"the reasons are in {plain(report)}" if report else "the report will say why"
        none = not any(path.stat().st_size for path in arguments.output.glob("records*.jsonl"))
        said = f"0 of {total} cases could be evaluated" if none else f"{failed} of {total} cases could not be evaluated"
        print(f"ima-seg: error: {said}; {where}", file=sys.stderr)
    return 1 if failed else 0


def _option(setting: str) -> str:
    """What a setting is called on the command line."""
    others = {
        "attacks": "attack",
        "corruptions": "corruption",
        "targets": "target",
        "nsd_tolerance_mm": "nsd-tolerance",
    }
    return "-step_size" if setting == "step_size" else f"--{others.get(setting, setting).replace('_', '-')}"


def _models(arguments: argparse.Namespace) -> dict[str, Path]:
    """Name -> folder, from ``-m`` or from ``-d -c -tr -p``."""
    if bool(arguments.models) == bool(arguments.dataset):
        raise UserError(
            "name the models either with -m MODEL_FOLDER and --bundle DIR or with -d DATASET -c CONFIGURATION"
        )
    if arguments.models:
        folders: list[Path] = arguments.models
    else:
        if arguments.configuration is None:
            raise UserError("-d needs -c CONFIGURATION, for example -c 3d_fullres")
        from ima_seg.nnunet.runs import model_folder

        folders = [
            model_folder(arguments.dataset, arguments.configuration, trainer, arguments.plans)
            for trainer in arguments.trainers
        ]
    names = arguments.names or _short_names(folders)
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise UserError(f"{len(folders)} models and the names {', '.join(names)}: give each its own with --name")
    return dict(zip(names, folders, strict=True))


def _label_values(assignments: Sequence[str]) -> dict[str, list[int]]:
    """``CLASS=V[,V]`` -> class: values."""
    found = {}
    for text in assignments:
        name, _, values = text.rpartition("=")
        if not name or not all(value.strip().isdigit() for value in values.split(",")):
            raise UserError(f"--bundle-labels {text!r} is not CLASS=VALUE or CLASS=VALUE,VALUE: 'tumour core=1,4'")
        found[name] = [int(value) for value in values.split(",")]
    return found


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Names of the trainers where they differ, else of the folders."""
    names, paths = [folder.resolve().name for folder in folders], [str(folder) for folder in folders]
    trainers = [name.split("__")[0] for name in names]
    return next((found for found in (trainers, names) if len(set(found)) == len(found)), paths)


def _modality(folder: Path) -> Literal["mr", "ct", "any"]:
    """That of a model by its channels; ``any`` by the format of pictures."""
    if (folder / "configs").is_dir():
        from ima_seg.monai.config import is_single_ct, read_metadata

        return "ct" if is_single_ct(read_metadata(folder)) else "mr"
    from ima_seg.cases.pictures import is_picture
    from ima_seg.nnunet.checkpoint import require_model_folder
    from ima_seg.nnunet.dataset import channel_names
    from ima_seg.nnunet.description import read_dataset

    description = read_dataset(require_model_folder(folder)[1])
    if is_picture(Path(f"case{description['file_ending']}")):
        return "any"
    return "ct" if all(name.lower() == "ct" for name in channel_names(description)) else "mr"


def _list(attacks: bool) -> None:
    from ima_seg.attacks.registry import ATTACKS, GROUPS, SPECIAL
    from ima_seg.evaluate.attack.corruptions import CORRUPTIONS

    if attacks:
        rows = {name: f"{spec.kind:5}  {spec.summary}" for name, spec in ATTACKS.items()}
        rows |= {name: f"{'':5}  {summary}" for name, summary in SPECIAL.items()}
        rows |= {name: f"{'':5}  = {' '.join(members)}" for name, members in GROUPS.items()}
    else:
        rows = {c.name: f"{c.modality:3}  {c.description}" for c in CORRUPTIONS.values()}
    for name, text in rows.items():
        print(f"{name:18} {text}")


def _report(arguments: argparse.Namespace) -> int:
    from ima_seg.evaluate.report import write_report

    said: list[str] = []
    report = write_report(arguments.folders, arguments.output or arguments.folders[0], log=said.append)
    print(f"wrote {plain(report)}")
    for line in said:
        print(f"ima-seg: error: {plain(line)}", file=sys.stderr)
    return 1 if said else 0
