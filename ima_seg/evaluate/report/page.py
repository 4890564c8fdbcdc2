"""``report.html``: an evaluation as one file that needs nothing else, made from its records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ima_seg.errors import UserError
from ima_seg.evaluate.measure.collect import Evaluation, collect
from ima_seg.evaluate.measure.summary import Summary, summarise
from ima_seg.evaluate.measure.tables import records_csv, summary_csv
from ima_seg.evaluate.report import charts, views, words
from ima_seg.evaluate.report.flags import check
from ima_seg.files import write_text


def write_report(folders: Sequence[Path], output: Path, *, log: Callable[[str], object] | None = None) -> Path:
    """Write ``report.html``, ``summary.json``, ``summary.csv`` and ``records.csv`` into ``output``.

    Args:
        folders: output folders of one evaluation; several where its cases or models were spread over folders.
        output: folder to write to, which may be one of them.
        log: gets every line of the records that could not be read, where anything is missing.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: folders that hold no evaluation or do not belong together, or jinja2 is missing.
    """
    evaluation = collect([Path(folder) for folder in folders])
    if log is not None:
        for fault in evaluation.damaged:
            log(f"{fault}; the line is left out, an evaluation with --resume says it again")
    summary = summarise(evaluation.run, evaluation.records, evaluation.failures)
    page = render(evaluation, summary)
    output = Path(output)
    write_text(output / "summary.json", summary.model_dump_json(indent=1) + "\n")
    write_text(output / "summary.csv", summary_csv(summary))
    write_text(output / "records.csv", records_csv(evaluation.run, evaluation.records))
    write_text(output / "report.html", page)
    return output / "report.html"


def render(evaluation: Evaluation, summary: Summary) -> str:
    """The page."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise UserError("the report needs jinja2, which is not installed: pip install jinja2") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "bounds": words.bounds,
        "p_value": words.p_value,
        "attack_name": words.attack_name,
        "svg": Markup,  # the charts escape their texts themselves
    }
    return environment.get_template("report.html.j2").render(**_context(evaluation, summary))


def _context(evaluation: Evaluation, summary: Summary) -> dict[str, Any]:
    run = evaluation.run
    flags = check(evaluation, summary)
    of_both = (words.headline, words.headline_eps, views.budget_sizes, views.dice_charts, views.corruption_charts)
    return {
        "run": run,
        "summary": summary,
        **{make.__name__: make(run, summary) for make in of_both},
        **views.case_table(evaluation, summary),
        "kinds": words.KINDS,
        "unit": words.unit_short(run),
        "sd": words.network_unit(run),
        "sd_words": words.sd_words(run, evaluation.records),
        "swatches": {name: charts.swatch(colour) for name, colour in views.colours(run).items()},
        "clean": [c for c in summary.conditions if c.kind == "clean"],
        "corruptions": [c for c in summary.conditions if c.kind == "corruption"],
        "margin_charts": views.margin_charts(run),
        "attacks": views.attack_rows(summary),
        "panels": views.panels(evaluation),
        "class_swatches": views.class_swatches(run),
        "flags": flags,
        "flag_counts": {s: sum(flag.status == s for flag in flags) for s in ("PASS", "WARN", "SKIP")},
        "failures": evaluation.failures,
        "duplicates": evaluation.duplicates,
        "others": evaluation.others,
        "areas": {(area.model, area.attack): area for area in summary.areas},
    }
