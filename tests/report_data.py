"""A made-up evaluation of two models: plausible numbers, from a seed, in the files that an evaluation writes.

One file: one made-up evaluation, of which every part depends on the others.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ima_seg.evaluate.records import (
    ClassMetrics,
    ClassState,
    Disk,
    Failure,
    Kind,
    Record,
    Size,
    SliceDice,
    append_line,
)
from ima_seg.evaluate.report import write_report
from ima_seg.evaluate.run import EvaluationSettings, ModelInfo, Run

EPS = [0.01, 0.03, 0.1, 0.3]
CLASSES = ["anterior", "posterior"]
NASTY = 'case <b>1</b> & "x"'
#: Dice at eps is clean / (1 + (eps / half) ** 2); smaller halves are stronger attacks.
HALF = {"fgsm": 2.6, "pgd": 1.0, "square": 4.0, "transfer": 3.0, "noise": 40.0}
KINDS: dict[str, Kind] = {"fgsm": "white", "pgd": "white", "square": "black", "noise": "noise"}
CORRUPTIONS = ["blur", "ghosting", "gamma"]
UNIT_HU = 120.0


def case_names(count: int) -> list[str]:
    return [NASTY, *(f"hippocampus_{17 * i + 1:03d}" for i in range(1, count))]


def make_run(count: int = 8) -> Run:
    rng = np.random.default_rng(5)
    settings = EvaluationSettings(
        attacks=["fgsm", "pgd", "square", "transfer", "noise", "minimal"],
        eps=EPS,
        steps=20,
        restarts=2,
        targets=["anterior"],
        corruptions=CORRUPTIONS,
        save_adversarial=True,
    )
    cases = case_names(count)
    history = [
        {
            "epoch": epoch,
            **{
                f"margin_q{q:02d}": min(0.3, 0.006 * (epoch + 1)) * share
                for q, share in zip((5, 25, 50, 75, 95), (0.4, 0.7, 0.9, 1.0, 1.1), strict=True)
            },
            "expanding_share": math.exp(-epoch / 15),
            "crossed_share": 1 - math.exp(-epoch / 12),
            "equilibrium": epoch > 40,
        }
        for epoch in range(50)
    ]
    models = [
        ModelInfo(
            name=name,
            folder=f"/models/{trainer}__nnUNetPlans__3d_fullres",
            trainer=trainer,
            plans="nnUNetPlans",
            configuration="3d_fullres",
            folds=["0"],
            checkpoint="checkpoint_final.pth",
            sha256={"fold_0/checkpoint_final.pth": f"{i}" * 64, "plans.json": "ab" * 32},
            patch_size=[40, 56, 40],
            spacing=[1.0, 1.0, 1.0],
            mirror_axes=[0, 1, 2],
            parameters=5_600_000,
            ima=None
            if i == 0
            else {
                "norm": "l2",
                "delta": 0.006,
                "eps_max": 0.3,
                "margins": {f"train_{k:03d}": float(np.clip(rng.gamma(9, 0.022), 0.01, 0.3)) for k in range(160)},
                "history": history,
            },
        )
        for i, (name, trainer) in enumerate({"standard": "nnUNetTrainer", "ima": "nnUNetTrainerIMA"}.items())
    ]
    return Run(
        settings=settings,
        models=models,
        dataset="Dataset004_Hippocampus",
        classes=CLASSES,
        images="/data/imagesTs",
        labels="/data/labelsTs",
        cases=cases,
        channels=["MRI"],
        modality_native_unit="original intensity units",
        command="ima-seg evaluate standard ima --images /data/imagesTs --labels /data/labelsTs -o out",
        created="2026-03-01T09:30:00+00:00",
        device="NVIDIA H100",
        versions={"ima-seg": "0.1.0", "nnunetv2": "2.8.0", "numpy": "2.1.0", "torch": "2.7.0"},
        machine="Linux-6.1-x86_64",
    )


def class_metrics(dice: float | None, state: ClassState = "ok", reference: int = 3000) -> ClassMetrics:
    """Metrics of a class with that Dice, counts to match."""
    if dice is None:
        return ClassMetrics(
            state="both_empty",
            dice=None,
            nsd=None,
            hd95_mm=None,
            reference_ml=0,
            prediction_ml=0,
            tp=0,
            fp=0,
            fn=0,
        )
    tp = round(dice * reference)
    return ClassMetrics(
        state=state,
        dice=dice,
        nsd=min(1.0, dice * 1.08),
        hd95_mm=1.2 + 30 * (1 - dice) ** 2,
        reference_ml=reference / 1000,
        prediction_ml=reference / 1000,
        tp=tp,
        fp=reference - tp,
        fn=reference - tp,
    )


def size_of(eps: float) -> Size:
    return Size(
        rms=eps,
        l2=eps * math.sqrt(89_600),
        linf=4 * eps,
        native_rms=[eps * UNIT_HU],
        native_linf=[4 * eps * UNIT_HU],
        percent_rms=[eps * 22],
        psnr_db=-20 * math.log10(eps / 5),
        ssim=1 / (1 + 3 * eps**2),
    )


def make_record(
    case: str, model: str, kind: Kind, attack: str, dice: list[float | None], eps: float | None = None, **more: object
) -> Record:
    """A record with that Dice per class."""
    classes = {name: class_metrics(value) for name, value in zip(CLASSES, dice, strict=True)}

    def mean(field: str) -> float | None:
        values = [value for item in classes.values() if (value := getattr(item, field)) is not None]
        return sum(values) / len(values) if values else None

    fields: dict[str, object] = {
        "case": case,
        "model": model,
        "kind": kind,
        "attack": attack,
        "classes": classes,
        "dice": mean("dice"),
        "nsd": mean("nsd"),
        "hd95_mm": mean("hd95_mm"),
        "seconds": 1.5,
    }
    if eps is not None:
        fields |= {"norm": "l2", "unit": "rms", "eps": eps, "eps_network": eps, "budget": "volume"}
        fields["size"] = size_of(eps)
    return Record.model_validate(fields | more)


def attacked_dice(clean: float, attack: str, eps: float, robust: bool) -> float:
    half = 0.045 * HALF[attack.split(":")[0]] * (2.2 if robust else 1.0)
    return clean / (1 + (eps / half) ** 2)


def make_records(run: Run, seed: int = 0) -> list[Record]:
    """All records; the last case lacks the posterior class, the one before lacks two attacks of the second model."""
    rng = np.random.default_rng(seed)
    records: list[Record] = []
    names = [model.name for model in run.models]
    quality = {case: rng.normal(0, 0.03) for case in run.cases}
    for model in names:
        robust = model == "ima"
        other = next(name for name in names if name != model)
        for case in run.cases:
            base = float(np.clip((0.85 if robust else 0.87) + quality[case] + rng.normal(0, 0.01), 0, 0.97))
            empty = case == run.cases[-1]
            tough = float(np.exp(rng.normal(0, 0.3)))

            def values(dice: float, empty: bool = empty) -> list[float | None]:
                dice = float(np.clip(dice, 0, 0.98))
                return [min(1.0, dice + 0.01), None if empty else max(0.0, dice - 0.01)]

            records.append(
                make_record(
                    case, model, "clean", "clean", values(base), slice_dice=SliceDice(mean=base - 0.05, slices=24)
                )
            )
            for attack in ("fgsm", "pgd", "square", f"transfer:{other}", "noise"):
                kind = KINDS.get(attack, "transfer")
                hurt = rng.normal(1, 0.08)
                for eps in run.settings.eps:
                    dice = base - (base - attacked_dice(base, attack, eps / tough, robust)) * min(hurt, 1.0)
                    more: dict[str, object] = {"slice_dice": SliceDice(mean=dice * 0.93, slices=24)}
                    if attack == "pgd":
                        course = dice + (base - dice) * np.exp(-np.arange(21) / 2.0)
                        more |= {"trace": course.tolist(), "zero_gradient": 0.0, "forwards": 42, "gradients": 40}
                        more["disk"] = Disk(
                            image=[f"adversarial/{model}/x_0000.nii.gz"],
                            difference=[f"adversarial/{model}/d_0000.nii.gz"],
                            dice=make_record(case, model, kind, attack, values(dice)).dice,
                            rms=eps * 1.0004,
                            linf=4 * eps,
                            resampled=False,
                        )
                        more["panel"] = f"panels/{model}_{run.cases.index(case)}_{eps}.npz"
                    records.append(make_record(case, model, kind, attack, values(dice), eps, **more))
            broken = (
                None if robust and case == run.cases[2] else float(0.045 * (2.2 if robust else 1) * rng.gamma(9, 1 / 9))
            )
            records.append(
                make_record(
                    case, model, "minimal", "minimal", values(0.49 * base), norm="l2", unit="rms", budget="volume",
                    breaking_rms=broken, size=None if broken is None else size_of(broken),
                )
            )  # fmt: skip
            for name in run.settings.corruptions:
                slope = {"blur": 0.02, "ghosting": 0.05, "gamma": 0.01}[name] * (0.8 if robust else 1)
                for severity in range(1, 6):
                    dice = values(base - slope * severity)
                    records.append(
                        make_record(case, model, "corruption", f"corruption:{name}", dice, severity=severity)
                    )
            for attack in ("disappear:anterior", "appear:posterior"):
                name = attack.split(":")[1]
                if empty and name == "posterior":
                    continue
                record = make_record(case, model, "targeted", attack, values(base * (0.6 if robust else 0.2)), EPS[2])
                left = (0.7 if robust else 0.15) if attack.startswith("dis") else (1.3 if robust else 2.4)
                changed = record.classes[name].model_copy(update={"prediction_ml": 3.0 * left})
                records.append(record.model_copy(update={"classes": record.classes | {name: changed}}))
    lacking = (run.cases[-2], names[-1])
    return [
        r
        for r in records
        if not ((r.case, r.model) == lacking and r.attack in ("square", "noise") and r.eps == EPS[-1])
    ]


def make_failures(run: Run) -> list[Failure]:
    return [
        Failure(case=run.cases[-3], model=None, message='label file: 3 dimensions, image 4 <script>alert("x")</script>')
    ]


def write_panel(path: Path, seed: int, eps: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (56, 40)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    radius = np.hypot((y - 28) / 1.4, x - 20)
    clean = 300 * np.exp(-((radius / 16) ** 2)) + 60 * np.sin(y / 3) * np.cos(x / 4) + rng.normal(0, 12, shape)
    delta = rng.normal(0, eps * UNIT_HU, shape)
    truth = np.where(radius < 9, np.where(y < 28, 1, 2), 0)
    before = np.where(np.hypot((y - 28) / 1.4, x - 20.5) < 8.7, np.where(y < 29, 1, 2), 0)
    after = np.where(np.hypot((y - 20) / 1.4, x - 24) < 4, 1, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        clean=clean.astype(np.float32),
        delta=delta.astype(np.float32),
        adversarial=(clean + delta).astype(np.float32),
        before=before.astype(np.int16),
        after=after.astype(np.int16),
        truth=truth.astype(np.int16),
        spacing=np.array([1.0, 1.3]),
        window=np.array([-60.0, 360.0]),
        index=np.array(12),
        axis=np.array(0),
    )


def write_evaluation(
    folder: Path, run: Run, records: list[Record], failures: list[Failure], *, parts: int = 1, panels: bool = True
) -> Path:
    """Write ``folder`` as an evaluation would, in ``parts`` parts."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.model_dump_json(indent=1))
    failed = {failure.case for failure in failures if failure.model is None}
    for i, case in enumerate(run.cases):
        suffix = "" if parts == 1 else f".part-{i % parts + 1}-of-{parts}"
        for record in records:
            if record.case == case and case not in failed:
                append_line(folder / f"records{suffix}.jsonl", record)
                if panels and record.panel is not None:
                    write_panel(folder / record.panel, i, record.eps or 0.0)
        for failure in failures:
            if failure.case == case:
                append_line(folder / f"failures{suffix}.jsonl", failure)
    return folder


def write_example(folder: Path, count: int = 8, *, parts: int = 1) -> Path:
    run = make_run(count)
    return write_evaluation(folder, run, make_records(run), make_failures(run), parts=parts)


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def page(example: Path) -> str:
    return write_report([example], example).read_text(encoding="utf-8")
