"""The sentences of the report that depend on its numbers; those that do not are in the templates."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ima_seg.evaluate.measure.compare import Comparison
from ima_seg.evaluate.measure.groups import WORST
from ima_seg.evaluate.measure.statistics import Estimate
from ima_seg.evaluate.measure.summary import Condition, Summary
from ima_seg.evaluate.records import Record
from ima_seg.evaluate.run import Run

KINDS = {
    "clean": "unchanged images",
    "white": "white box: uses the gradients of the model",
    "black": "black box: uses the outputs of the model only",
    "transfer": "made on another model",
    "noise": "random, no attack",
    "worst": "per case the attack with the lowest Dice",
    "minimal": "smallest perturbation that breaks a case",
    "targeted": "one organ is to disappear or to appear",
    "corruption": "natural corruption",
}
NAMES = {
    "fgsm": "FGSM",
    "ifgsm": "I-FGSM",
    "pgd": "PGD",
    "apgd-ce": "APGD, cross-entropy",
    "apgd-margin": "APGD, margin",
    "apgd-dice": "APGD, Dice",
    "segpgd": "SegPGD",
    "cospgd": "CosPGD",
    "sea-masked-ce": "SEA, masked cross-entropy",
    "sea-balanced-ce": "SEA, balanced cross-entropy",
    "sea-js": "SEA, Jensen-Shannon",
    "vafa": "VAFA",
    "patch-pgd": "PGD on each patch",
    "gaussian": "Gaussian noise",
    "uniform": "Uniform noise",
    "noise": "Random noise",
    "worst": "Worst attack",
    "minimal": "smallest breaking perturbation",
}


def attack_name(attack: str) -> str:
    """How an attack is called in headings."""
    if attack in NAMES:
        return NAMES[attack]
    if attack.startswith("transfer:"):
        return f"Transfer from {attack.split(':', 1)[1]}"
    name = attack.removeprefix("corruption:").replace("_", " ")
    return name[:1].upper() + name[1:]


def number(value: float | None, digits: int = 3) -> str:
    """With a fixed number of digits and a true minus sign; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def bounds(item: Estimate | None, digits: int = 3) -> str:
    """The interval, without parentheses; empty where there is none."""
    if item is None or item.low is None or item.high is None:
        return ""
    between = " to " if item.low < 0 else "–"
    return f"{number(item.low, digits)}{between}{number(item.high, digits)}"


def with_interval(item: Estimate | None, digits: int = 3) -> str:
    """For sentences: ``0.84 (95 % CI 0.80–0.88)``."""
    interval = bounds(item, digits)
    between = f" (95\u00a0%\u00a0CI {interval})" if interval else ""
    return "not known" if item is None else number(item.estimate, digits) + between


def p_value(p: float) -> str:
    """``0.012`` or ``< 0.001``."""
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}"


def network_unit(run: Run) -> str:
    """Standard deviations of the network's input, but in evaluations of bundles by older versions."""
    return "network units" if any(model.bundle and not model.sd for model in run.models) else "SD"


def sd_words(run: Run, records: Sequence[Record]) -> dict[str, str]:
    """Model -> what one SD of each channel is, of models whose normalisation does not make it 1."""
    found = {}
    for model in run.models:
        measured = [record.sd for record in records if record.model == model.name and record.sd]
        parts = []
        for index, sd in enumerate(model.sd):
            size, of = sd, " in the training set's foreground"
            if sd is None:
                size, of = (median(sds[index] for sds in measured) if measured else None), " in the median case"
            units = "measured in each case" if size is None else f"{size:.3g} network units{of}"
            if sd == 1:
                units = "1 network unit"
            parts.append(f"{run.channels[index]}: {units}")
        if parts:
            found[model.name] = "; ".join(parts)
    return found


def unit_short(run: Run) -> str:
    """Unit of eps for axis labels."""
    settings, sd = run.settings, network_unit(run)
    kind = "RMS" if settings.norm == "l2" else "largest change"
    return {
        "rms": f"RMS per voxel, {sd}",
        "linf": f"largest change per voxel, {sd}",
        "l2": f"L2 norm of the {settings.budget}, {sd}",
        "hu": f"{kind} per voxel, {run.modality_native_unit}",
        "percent": f"{kind} per voxel, % of intensity range",
    }[settings.unit]


def budget_words(run: Run, eps: float) -> str:
    """A budget within a sentence."""
    settings, sd = run.settings, network_unit(run)
    kind = "an RMS perturbation of " if settings.norm == "l2" else "a perturbation of at most "
    return {
        "rms": f"an RMS perturbation of {eps:g} {sd} per voxel",
        "linf": f"a perturbation of at most {eps:g} {sd} per voxel",
        "l2": f"a perturbation of L2 norm {eps:g} {sd} over the {settings.budget}",
        "hu": f"{kind}{eps:g} {run.modality_native_unit} per voxel",
        "percent": f"{kind}{eps:g} % of the image's intensity range per voxel",
    }[settings.unit]


def headline_eps(run: Run, summary: Summary) -> float | None:
    """The smallest eps at which the reference model is below half of its clean Dice, else the largest.

    The rule looks at the reference model alone, so that it cannot favour another.
    """
    clean = summary.find(summary.reference, "clean")
    half = 0.5 * clean.dice.estimate if clean is not None and clean.dice is not None else 0.0
    worst = [c for c in summary.conditions if c.model == summary.reference and c.attack == WORST]
    below = [c.eps for c in worst if c.eps is not None and c.dice is not None and c.dice.estimate < half]
    return min(below, default=max((c.eps for c in worst if c.eps is not None), default=None))


def _difference(test: Comparison, total: int) -> str:
    p = p_value(test.p_holm)
    p = p if p.startswith("<") else f"=\u00a0{p}"
    correction = f", Holm-corrected for {total} comparisons" if total > 1 else ""
    found = f"difference {with_interval(test.difference)}, p\u00a0{p}"
    return f"{found} (Wilcoxon signed-rank test, {test.n} cases{correction})"


def headline(run: Run, summary: Summary) -> list[str]:
    """What was found, in a few sentences."""
    clean = {model.name: c for model in run.models if (c := summary.find(model.name, "clean")) is not None}
    eps = headline_eps(run, summary)
    if eps is None:
        if not clean:
            return [
                f"None of the {summary.cases} cases could be evaluated; the reasons are under Checks, Failed cases."
            ]
        parts = ", ".join(f"{with_interval(c.dice)} for {name}" for name, c in clean.items())
        return [f"On unchanged images the mean Dice is {parts}. No attack with a budget was run."]
    falls: list[str] = []
    tests: list[str] = []
    for name, c in clean.items():
        worst = summary.find(name, WORST, eps)
        if c.dice is None or worst is None or worst.dice is None:
            continue
        verb = "falls" if worst.dice.estimate < c.dice.estimate else "goes"
        whose = "that of" if falls else "of"
        falls.append(f"{whose} {name} {verb} from {number(c.dice.estimate)} to {with_interval(worst.dice)}")
        for test in summary.comparisons:
            if (test.model, test.attack, test.eps) == (name, WORST, eps):
                against = f"{name} minus {test.reference}: " if len(run.models) > 2 else ""
                tests.append(against + _difference(test, len(summary.comparisons)))
    sentences: list[str] = []
    if falls:
        compared = f"; {'; '.join(tests)}" if tests else ""
        sentences.append(f"At {budget_words(run, eps)} the mean Dice {', '.join(falls)}{compared}.")
    for cost in summary.clean_costs:
        bound = f" (one-sided 95\u00a0% lower bound {number(cost.lower)})" if cost.lower is not None else ""
        sentences.append(
            f"On unchanged images the Dice of {cost.model} differs from that of {cost.reference} by "
            f"{number(cost.difference)}{bound}: a loss of {cost.margin:g} or more is "
            f"{'' if cost.holds else 'not '}ruled out."
        )
    for item in summary.breaking:
        sentences.append(
            f"The smallest perturbation found that breaks a case has a median RMS of {number(item.median_rms)} "
            f"{network_unit(run)} per voxel for {item.model} ({item.broken} of {item.n} cases broken)."
            if item.median_rms is not None
            else f"Most cases of {item.model} could not be broken by the search for the smallest perturbation "
            f"({item.broken} of {item.n} were)."
        )
    return sentences


def describe(condition: Condition) -> str:
    """A condition in a few words, for tooltips and alternative text."""
    budget = "" if condition.eps is None else f" at eps {condition.eps:g}"
    severity = "" if condition.severity is None else f", severity {condition.severity}"
    return f"{condition.model}, {attack_name(condition.attack)}{budget}{severity}: {with_interval(condition.dice)}"
