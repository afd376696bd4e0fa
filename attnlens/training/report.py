"""``report.md``: what was done, what was found, and what the intervals allow to say, nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from attnlens.printable import Markdown, as_code, in_markdown
from attnlens.training.arms import BASELINE, CONTROLS, PRETRAINED
from attnlens.training.config import AUGMENTATIONS, Config
from attnlens.training.ladder import Step, ladder_of
from attnlens.training.metrics import ACCURACY, Metric
from attnlens.training.optimizers import DEFAULT
from attnlens.training.results import Summary
from attnlens.training.statistics import (
    LEVEL,
    SCREENING_BELOW,
    Contrast,
    EpochsTo,
    GapClosed,
    Mean,
    smallest_sign_flip,
)
from attnlens.words import counted

_ALPHA = 1 - LEVEL
LrTable = Mapping[str, Mapping[float, float]]
"""Mean of the metric on the tuning split by arm and learning rate."""


def render_report(summary: Summary, tuning: LrTable | None = None) -> str:
    """Return the report's text, in which names and what records say of themselves are no Markdown."""
    config, metric = summary.config, summary.config.metric
    parts = [
        f"# {in_markdown(config.dataset)}: {in_markdown(', '.join(config.arms))}{_frozen(config)}",
        _state(summary),
        "## What the intervals allow to say",
        "\n".join(f"- {line}" for line in conclusions(summary)),
        f"## {metric.title.capitalize()} at the last epoch",
        _values(summary),
        *(["## Declared contrasts", _contrasts(summary)] if summary.contrasts else []),
    ]
    ladder = ladder_of(config.network.ladder, summary.finished, summary.contrasts)
    if ladder:
        parts += ["## What each step of the ladder is worth", _ladder(ladder, metric)]
    if summary.gaps:
        parts += ["## Share of the gap to the pre-trained model closed", _gaps(summary.gaps)]
    parts += [
        f"## Epochs to {metric.value(config.target)}",
        _epochs(summary.epochs, config.eval_every, config.recipe.epochs),
    ]
    if tuning:
        parts += ["## Learning rates, chosen on the tuning split", _tuning(tuning, summary.lrs, config)]
    parts += ["## Conditions", _conditions(summary), "## Limits", _limits(summary)]
    return "\n\n".join(parts) + "\n"


def conclusions(summary: Summary) -> list[str]:
    """Return a sentence a contrast, in words its interval allows."""
    config = summary.config
    return [
        conclusion(contrast, len(summary.contrasts), config.metric, _role(contrast, config))
        for contrast in summary.contrasts
    ] or ["No contrast was declared."]


def conclusion(contrast: Contrast, family: int, metric: Metric = ACCURACY, role: str = "") -> str:
    """Say what one contrast shows: a difference, a hint, or nothing with what the interval still allows.

    With few seeds it is called a direction and never a difference; without spread it has no interval to go by.
    """
    one, n = contrast.difference, contrast.difference.n
    names = f"**{contrast.arm}** against **{contrast.other}**"
    if n < 2:
        return f"{names}: {counted(n, 'pair')} of finished runs, too few for an interval. Nothing can be said."
    prefix = f"{names}{role}: " + (f"screening only, n = {n}. " if n < SCREENING_BELOW else "")
    shown = metric.difference
    if math.isinf(one.low):
        return (
            f"{prefix}the difference was the same in every seed (n = {n}), {shown(one.mean)} {metric.unit}: without "
            "spread there is no interval and no p-value."
        )
    interval = f"{shown(one.mean)} {metric.unit}, {LEVEL:.0%} interval {shown(one.low)} to {shown(one.high)}"
    word = metric.better if metric.favours(one.mean) else metric.worse
    if n < SCREENING_BELOW:
        alike = sum((value > 0) == (one.mean > 0) and value != 0 for value in contrast.differences)
        return (
            f"{prefix}{interval}; {contrast.arm} was {word} in {alike} of {counted(n, 'seed')}. A direction at most: "
            f"no difference is called one under n = {SCREENING_BELOW}."
        )
    tail = f" (n = {n}, Holm-corrected p {_equals(contrast.t_holm)}, sign-flip p {_equals(contrast.sign_flip_p)})"
    if one.low <= 0 <= one.high:
        return f"{prefix}no difference was shown: {interval}{tail}."
    if contrast.t_holm < _ALPHA:
        return f"{prefix}{contrast.arm} was {word}: {interval}{tail}."
    return (
        f"{prefix}the interval points to {contrast.arm} being {word}, {interval}, but this does not survive "
        f"the correction over {counted(family, 'contrast')}{tail}."
    )


def _role(contrast: Contrast, config: Config) -> str:
    start = config.starts.get(contrast.other)  # not told of the arms a pre-trained model had from the first
    matched = (
        start.startswith(f"norm-matched of={contrast.arm}") if start else CONTROLS.get(contrast.arm) == contrast.other
    )
    return f" ({config.network.control_keeps})" if matched else ""


def _frozen(config: Config) -> str:
    return ", depthwise filters frozen" if config.freeze_filters else ""


def _state(summary: Summary) -> str:
    config, ended = summary.config, sum(map(len, summary.finished.values()))
    seeds, epochs = counted(config.seeds, "seed"), counted(config.recipe.epochs, "epoch")
    conditions = f"{seeds} an arm, {epochs}, on {in_markdown(config.dataset)}"
    parts = [f"{ended} of {counted(summary.expected, 'run')} finished; {conditions}."]
    if config.source_data is not None:
        words = f"Source: {in_markdown(config.source_data.words)}."
        parts.append(words if config.source_data.shared is False else f"**{words}**")
    if not summary.complete:
        parts.append("**Unfinished: everything below changes when the remaining runs are done.**")
    if summary.screening:
        parts.append(
            f"**Screening: with fewer than {SCREENING_BELOW} seeds no sign-flip p-value can go under .05. Directions, "
            "not results.**"
        )
    for arm, seed, epoch in summary.diverged:
        parts.append(
            f"**{in_markdown(arm)}, seed {seed}, diverged in epoch {epoch}: it is left out of every number below, so "
            "they describe the seeds that finished.**"
        )
    if config.commonest is not None:
        parts.append(
            f"**Uneven classes: the commonest is {config.commonest:.1%} of the test images, what a constant answer "
            "scores in plain accuracy. Every class counts alike here, whatever its size (balanced accuracy).**"
        )
    return "\n\n".join(parts)


def _values(summary: Summary) -> str:
    metric = summary.config.metric
    rows = [
        [
            arm,
            str(mean.n),
            metric.value(mean.mean),
            metric.number(mean.sd),
            _interval(mean, metric.value),
            ", ".join(metric.number(value) for _, value in sorted(summary.finished[arm].items())),
        ]
        for arm, mean in summary.means.items()
    ]
    table = _table(["arm", "n", "mean", "sd", f"{LEVEL:.0%} interval", "by seed"], rows)
    return f"{table}\n\nLower is better." if metric.lower_is_better else table


def _contrasts(summary: Summary) -> str:
    metric = summary.config.metric
    rows = [
        [
            f"{one.arm} - {one.other}",
            str(one.difference.n),
            metric.difference(one.difference.mean),
            _interval(one.difference, metric.difference),
            _p(one.t_p),
            _p(one.t_holm),
            _p(one.sign_flip_p),
            _p(one.sign_flip_holm),
        ]
        for one in summary.contrasts
    ]
    head = ["contrast", "n", metric.unit, f"{LEVEL:.0%} interval", "p", "Holm", "sign-flip p", "Holm"]
    sign = " A negative difference speaks for the first arm." if metric.lower_is_better else ""
    told = f"Paired by seed; t intervals, not corrected. Holm over {counted(len(rows), 'contrast')}.{sign}"
    return f"{_table(head, rows)}\n\n{told} {_reachable(summary.contrasts)}".rstrip()


def _reachable(contrasts: Sequence[Contrast]) -> str:
    """Say how small a Holm-corrected sign-flip p-value can get at all, given how many contrasts were declared."""
    n = max((contrast.difference.n for contrast in contrasts), default=0)
    if n < 2:
        return ""
    family = len(contrasts)
    least = smallest_sign_flip(n, family)
    one = "this contrast cannot" if family == 1 else "none of these contrasts can"
    never = "" if least < _ALPHA else f": {one} go under .05 that way"
    return (
        f"With n = {n} and {counted(family, 'contrast')} the corrected sign-flip p cannot go under {_p(least)}{never}."
    )


def _ladder(ladder: Sequence[Step], metric: Metric) -> str:
    def told(contrast: Contrast) -> list[str]:
        pairs = contrast.difference
        return [metric.difference(pairs.mean), _interval(pairs, metric.difference), _p(contrast.t_holm)]

    rows = [
        [
            f"{step.arm}{'' if step.nested else ' (other)'}",
            step.keeps,
            *told(step.step),
            *told(step.from_start),
            metric.difference(step.left.mean),
            _interval(step.left, metric.difference),
        ]
        for step in ladder
    ]
    first, last = ladder[0].below, ladder[-1].arm
    interval = f"{LEVEL:.0%} interval"
    head = ["rung", "keeps of the source", "step", interval, "Holm", f"minus {first}", interval, "Holm", "left"]
    others = [f"{step.arm} over {step.below}" for step in ladder if not step.nested]
    named = " and ".join(filter(None, (", ".join(others[:-1]), *others[-1:])))
    limits = (
        f" (other): {named} {'keeps' if len(others) == 1 else 'keep'} other things of the source, not more: such a "
        "step is the difference between two summaries of it and no part of a sum."
        if others
        else ""
    )
    return (
        f"{_table([*head, interval], rows)}\n\n"
        f"step: the rung minus the one above it; left: {last} minus the rung, what it does not explain, not tested; "
        f"in {metric.unit}.{limits} A step is what a rung adds when it comes at this place of the order; another "
        "order could share the whole out otherwise."
    )


def _gaps(gaps: Sequence[GapClosed]) -> str:
    rows = []
    for gap in gaps:
        shown = [_number(gap.share, 2), f"{_number(gap.low, 2)} to {_number(gap.high, 2)}"]
        rows.append([gap.arm, str(gap.n), *([f"not given: {gap.refused}", ""] if gap.refused else shown)])
    return (
        f"{_table(['arm', 'n', 'share', f'{LEVEL:.0%} interval'], rows)}\n\n"
        f"(arm - {BASELINE}) / ({PRETRAINED} - {BASELINE}), not clipped, over the seeds that all three finished; "
        "Fieller's intervals, not corrected for how many arms there are."
    )


def _epochs(arms: Sequence[EpochsTo], every: int, epochs: int) -> str:
    rows = []
    for one in arms:
        missed = "not reached by half of the seeds" if one.by_seed else "none"
        median = missed if one.median is None else f"{one.median:g}"
        rows.append([one.arm, f"{one.reached} of {len(one.by_seed)}", median])
    often = (
        f"every {counted(every, 'epoch')} and the last one"
        if 1 < every < epochs
        else "each"
        if every == 1
        else "the last one"
    )
    return (
        f"{_table(['arm', 'reached', 'median epoch'], rows)}\n\n"
        f"Fixed beforehand, read at the measured epochs ({often}), of the runs that finished. A seed that never "
        "reached it counts as later than every number."
    )


def _tuning(tuning: LrTable, chosen: Mapping[str, float], config: Config) -> str:
    grid = sorted({lr for row in tuning.values() for lr in row})
    rows = [
        [arm, *(config.metric.value(row[lr]) if lr in row else "diverged" for lr in grid), f"{chosen[arm]:g}"]
        for arm, row in tuning.items()
        if arm in chosen
    ]
    return (
        f"{_table(['arm', *(f'{lr:g}' for lr in grid), 'chosen'], rows)}\n\n"
        f"{config.metric.title.removeprefix('test ').capitalize()} on a tenth of the training "
        f"{config.network.reads}, held out for this, with seeds that are used for nothing else."
    )


def _conditions(summary: Summary) -> str:
    config, recipe = summary.config, summary.config.recipe
    source = ", ".join(f"{key} {value}" for key, value in config.source.items() if value is not None)
    if (config.network.prefix and config.source.get("sha256") is None) or config.source.get("drawn"):
        source = f"none ({source}): every arm starts from drawn weights"
    decay = f"weight decay {recipe.weight_decay:g}, gradient norm clipped at {recipe.clip_norm:g}"
    optimizer = "AdamW" if recipe.optimizer == DEFAULT else f"timm's {recipe.optimizer}"
    regularisers = recipe.regularisers()
    tuned = f" in runs of {counted(config.tune_epochs, 'epoch')}" if config.tune_epochs else ""
    lr = f"chosen per arm{tuned}" if config.lr_grid else f"{recipe.lr:g}"
    warmup = f"linear warm-up over {recipe.warmup:.0%} of the steps, cosine to {recipe.min_lr:g}"
    rows = [
        ["data", _data(config)],
        ["data sha256", config.data_sha256],
        ["network", f"{config.network.describe()}{_frozen(config)}"],
        ["pre-trained source", source],
        ["training", f"{optimizer}, lr {lr}, {decay}, {warmup}, batch {recipe.batch_size}"],
        ["augmentation", AUGMENTATIONS[recipe.augment]],
        *([["regularisation", regularisers]] if regularisers else []),
        ["epochs", f"{recipe.epochs}, of which {config.passes:.2f} effective; the last one counts"],
        ["pairing", _pairing(summary)],
        [
            "seeds",
            f"data from {config.data_seed}, initialisation from {config.init_seed}, {counted(config.seeds, 'pair')}",
        ],
        ["engine", _engine(summary)],
        ["training time", f"{summary.train_seconds:.0f} s over all runs, evaluation not counted"],
        ["device", "; ".join(summary.devices)],
        ["versions", ", ".join(f"{name} {version}" for name, version in summary.versions.items())],
        ["command", Markdown("; ".join(map(as_code, summary.commands)))],
        ["config sha256", config.sha256()],
    ]
    rows[5:5] = [[f"arm {arm}", start] for arm, start in config.starts.items()]
    return _table(["", ""], rows)


def _engine(summary: Summary) -> str:
    config, sizes = summary.config, summary.stacks
    attention = f", {config.attention} attention" if config.attention else ""
    how = "compiled" if config.compiled else "eager"
    stacks = f"stacks of {config.stack}"
    if sizes and sizes != (config.stack,):  # what is left over, an architecture with fewer arms, memory that ended
        stacks = f"stacks of at most {config.stack}, trained in {' and '.join(map(str, sizes))}"
    return f"{config.precision}, {how}{attention}, {stacks}"


def _data(config: Config) -> str:
    text = config.text
    if text is None:
        kept = "" if config.classes is None else f", of the classes {', '.join(config.classes)} alone"
        unused = ", ".join(f"{count} {what}" for what, count in config.left_out.items())
        left_out = f"; left out: {unused}" if unused else ""
        tested = counted(config.test_items, "test image")
        return f"{config.dataset}: {config.train_items} training and {tested}{kept}{left_out}"
    return (
        f"{config.dataset}: {text.train_bytes} training and {text.test_bytes} test bytes of "
        f"{counted(text.files, 'file')}, {text.split}; {counted(config.train_items, 'window')} an epoch, drawn with "
        f"replacement, and {counted(config.test_items, 'test window')} side by side"
    )


def _pairing(summary: Summary) -> str:
    if not summary.streams:
        return "nothing to compare yet"
    if len(summary.config.arms) == 1:
        return "one arm: nothing to compare"
    least, most = min(summary.streams.values()), max(summary.streams.values())
    arms = counted(most, "arm") if least == most else f"{least} to {counted(most, 'arm')}"
    return f"hashes of order and augmentation equal in every epoch, over the {arms} of each seed"


def _limits(summary: Summary) -> str:
    config = summary.config
    covered = "the spread over seeds (order, augmentation, initial weights)"
    lines = [
        "One data set, one network size, one recipe, one horizon: another choice may order the arms differently.",
        f"The intervals cover {covered}, not over test {config.items}.",
        config.network.limits,
    ]
    if config.freeze_filters:
        lines.append("Depthwise filters got no update in any arm: nothing here is about networks that train them.")
    if not config.lr_grid:
        lines.append("The learning rate was the same for every arm and tuned for none (`--tune-lr` does that).")
    if PRETRAINED in config.arms:
        lines.append(
            f"{PRETRAINED} starts from weights that were trained before: its epochs here come on top of those. It is "
            "where a good start can lead, not a rival under equal conditions."
        )
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(in_markdown, row))} |" for row in rows)])


def _interval(mean: Mean, show: Callable[[float], str]) -> str:
    if math.isinf(mean.low):
        return "none"
    return f"{show(mean.low)} to {show(mean.high)}"


def _number(value: float, digits: int = 1) -> str:
    return "none" if math.isnan(value) else f"{value:.{digits}f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "none"
    return "< .0001" if value < 1e-4 else f"{value:.4f}".lstrip("0") if value < 1 else "1"


def _equals(value: float) -> str:
    shown = _p(value)
    return shown if shown.startswith("<") else f"= {shown}"
