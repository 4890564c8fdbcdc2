"""The folder of an evaluation: whose it is, and what killed evaluations left in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ima_seg.errors import UserError
from ima_seg.evaluate.attack.share import Share
from ima_seg.evaluate.measure.collect import read_run
from ima_seg.evaluate.run import Run
from ima_seg.files import remove_stale, write_text


def record_files(out: Path) -> list[Path]:
    """The records of all parts."""
    return sorted(out.glob("records*.jsonl"))


def check_folder(out: Path) -> None:
    """Refuse what cannot become the folder of an evaluation, before anything is written there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder with -o")
    if not (out / "run.json").is_file() and record_files(out):
        raise UserError(f"{out} holds records but no run.json; name another folder with -o")


def claim(out: Path, run: Run, share: Share, *, resume: bool, log: Callable[[str], None]) -> None:
    """Make ``out`` the folder of ``run``, or make sure that it is, and remove what killed evaluations left there.

    The cases may be others than before: those that are gone leave the report, with their records kept.

    Raises:
        UserError: it holds another evaluation, or one that was begun while ``resume`` is not set.
    """
    fresh = not (out / "run.json").is_file()
    share.wait()
    if share.rank == 0:
        for folder in (out, out / "panels", *(out / "adversarial").glob("*/*/*/")):
            remove_stale(folder)
    if fresh:
        if share.rank == 0:
            write_text(out / "run.json", run.model_dump_json(indent=1) + "\n")
        return
    there = read_run(out)
    mine, theirs = run.settings.model_dump(), there.settings.model_dump()
    differing = [f"{name} is {mine[name]!r}, there {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]
    # The packages on which numbers depend.
    decisive = ["ima-seg", "nnunetv2", *(["monai"] if any(model.bundle for model in run.models) else [])]
    differing += [
        f"{what} are others"
        for what, new, old in (
            ("the models", [(m.name, m.sha256) for m in run.models], [(m.name, m.sha256) for m in there.models]),
            ("the units of sizes", [m.sd for m in run.models], [m.sd for m in there.models]),
            ("the folders of images and labels", (run.images, run.labels), (there.images, there.labels)),
            ("the versions", *({k: r.versions.get(k) for k in decisive} for r in (run, there))),
        )
        if new != old
    ]
    if differing:
        raise UserError(
            f"{out} holds an evaluation with other settings ({'; '.join(differing)}); results are never mixed, name "
            "another folder with -o"
        )
    # Files of the other parts of the same array are no reason to stop.
    own = f"records{share.suffix}.jsonl"
    names = [path.name for path in record_files(out)]
    begun = [name for name in names if name == own or not name.endswith(f"-of-{share.count}.jsonl")]
    if begun and not resume:
        raise UserError(f"{out} holds this evaluation already, in part or whole; go on with --resume, or name another")
    if share.rank > 0:
        return
    before, now = set(there.cases), set(run.cases)
    gone, new = [case for case in there.cases if case not in now], [case for case in run.cases if case not in before]
    for words, names in (("are gone, their records are kept but left out of the report", gone), ("are new", new)):
        if names:
            log(f"{len(names)} cases {words}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}")
    if gone or new:
        write_text(
            out / "run.json",
            there.model_copy(update={"cases": run.cases, "models": run.models}).model_dump_json(indent=1) + "\n",
        )
