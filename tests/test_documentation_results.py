"""Every number of a table on a page is that of the file of results that stands beside it, at the digits it is given."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import attnlens
from attnlens.statistics.verdicts import Verdict

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"(?<![\w.,])(< ?)?([+-]?(?:\d[\d,]*)?\.?\d+(?:e[+-]\d+)?)(?![\w,.]*\w)")


def loaded(name):
    return json.loads((RESULTS / name).read_text())


def numbers(text):
    """Return the numbers of a text, each with what half a unit of its last digit is and whether it is a bound."""
    found = []
    for bound, number in NUMBER.findall(re.sub(r"n = \d+", "", text)):
        mantissa, _, exponent = number.replace(",", "").partition("e")
        digits = len(mantissa.partition(".")[2])
        half = 0.005 if number == "1" else 0.5 * 10.0 ** (int(exponent or 0) - digits)  # a p-value of 1 is no .6
        found.append((float(number.replace(",", "")), half, bool(bound)))
    return found


def agree(shown, values):
    """Say whether the numbers of a text are these values, rounded; ``< x`` stands for a value below x."""
    found = numbers(shown)
    return len(found) == len(values) and all(
        value < number if bound else abs(number - value) <= half * (1 + 1e-6) + 1e-12
        for (number, half, bound), value in zip(found, values, strict=True)
    )


def table(page, first):
    """Return the rows, as cells, of the table of a page whose line of titles begins with ``| first |``."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith(f"| {first} |")]
    assert len(starts) == 1, (page, first, len(starts))
    rows = []
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def points(mean, *, interval=True):
    return [100 * mean[name] for name in (("mean", "low", "high") if interval else ("mean",))]


class Comparison:
    """One comparison's summary, with what tables say of an arm."""

    def __init__(self, folder):
        self.summary = loaded(f"{folder}/summary.json")
        self.against = {(one["arm"], one["other"]): one for one in self.summary["contrasts"]}
        self.gaps = {one["arm"]: one for one in self.summary["gap_closed"]}
        self.steps = {one["arm"]: one for one in self.summary.get("ladder") or ()}

    def accuracy(self, arm, *, interval=False):
        return points(self.summary["arms"][arm]["accuracy"], interval=interval)

    def over_default(self, arm, *, p=False):
        one = self.against.get((arm, "default"))
        return [] if one is None else [*points(one["difference"]), *([one["t_holm"]] if p else [])]

    def share(self, arm):
        return [self.gaps[arm][name] for name in ("share", "low", "high")] if arm in self.gaps else []

    def rung(self, arm, *, p, left=None):
        """Return the numbers of a rung: with p-values or without, what is left with its interval, without, or not."""
        step = self.steps.get(arm)
        if step is None:
            return []
        told = []
        for name in ("step", "from_start"):
            told += [*points(step[name]["difference"]), *([step[name]["t_holm"]] if p else [])]
        return told + ([] if arm == "pretrained" or left is None else points(step["left"], interval=left))


def of_arm(cells):
    """Return the arm of a row and the numbers behind it."""
    return re.search(r"[\w-]+", cells[0])[0], " | ".join(cells[1:])


def digits_on_its_page(one, arm):
    return one.accuracy(arm, interval=True) + one.over_default(arm)


def digits_among_results(one, arm):
    return digits_on_its_page(one, arm) + one.share(arm)


def ladder_on_its_page(one, arm):
    return one.accuracy(arm) + one.rung(arm, p=True, left=True)


def ladder_among_results(one, arm):
    return one.accuracy(arm) + one.rung(arm, p=False, left=False)


def ladder_on_the_front_page(one, arm):
    return one.accuracy(arm) + one.rung(arm, p=False)


def wiring(one, arm):
    return one.accuracy(arm, interval=True) + one.over_default(arm, p=True)


def start(one, arm):
    return one.accuracy(arm) + one.over_default(arm, p=True)


def both(one, arm):
    return start(one[0], arm) + start(one[1], arm)


COMPARISONS = [
    ("training.md", "arm | test accuracy, mean", "digits_cpu", digits_on_its_page),
    ("results.md", "start | test accuracy, mean of n = 6", "digits_cpu", digits_among_results),
    ("results.md", "start keeps of the source", "ladder_natural_cpu", ladder_among_results),
    ("../README.md", "start keeps of the source", "ladder_natural_cpu", ladder_on_the_front_page),
    ("signal.md", "network | test accuracy, mean", "skipless_cpu", wiring),
    ("filters.md", "start of the filters | filters frozen", "convmixer_natural_frozen_cpu", start),
    ("filters.md", "start of the filters | filters trained", "convmixer_natural_cpu", start),
    (
        "filters.md",
        "start of the filters, 7 x 7",
        ("convmixer7_natural_frozen_cpu", "convmixer7_natural_cpu"),
        both,
    ),
    (
        "filters.md",
        "start of the filters | test accuracy, filters trained",
        ("convmixer_cpu", "convmixer_frozen_cpu"),
        both,
    ),
]


@pytest.mark.parametrize(("page", "first", "folders", "expected"), COMPARISONS)
def test_a_table_of_starts_holds_the_numbers_of_its_comparison(page, first, folders, expected):
    found = Comparison(folders) if isinstance(folders, str) else tuple(map(Comparison, folders))
    arms = (found if isinstance(found, Comparison) else found[0]).summary["arms"]
    told = [of_arm(cells) for cells in table(page, first)]
    assert {arm for arm, _ in told} == set(arms)
    for arm, shown in told:
        assert agree(shown, expected(found, arm)), (page, arm, shown, expected(found, arm))


def test_sentences_on_the_ladder_give_its_shares_and_its_stars():
    found = Comparison("ladder_natural_cpu")

    def share(arm):
        return " ".join(f"{one:.2f}"[1:] for one in found.share(arm))

    told = {page: " ".join((ROOT / "docs" / page).read_text().split()) for page in ("results.md", "training.md")}
    written = "{} [{}, {}] of the gap"
    for text in told.values():
        assert "closes " + written.format(*share("pretrained-attention").split()) in text
    assert "closes " + written.format(*share("fitted").split()) in told["training.md"]
    assert f"Holm over {len(found.summary['contrasts'])} declared contrasts" in told["results.md"]
    for page in ("results.md", "../README.md"):
        for arm, shown in map(of_arm, table(page, "start keeps of the source")):
            step = found.steps.get(arm)
            starred = [step[name]["t_holm"] < 0.05 for name in ("step", "from_start")] if step else []
            assert [cell.endswith("*") for cell in shown.split(" | ")[1:3]][: len(starred)] == starred, (page, arm)


@pytest.mark.parametrize("heading", ["The ladder on natural images, on a CPU", "The ladder on digits"])
def test_the_tables_of_the_ladders_hold_the_numbers_of_their_comparisons(heading):
    section = (ROOT / "docs" / "training.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = Comparison(re.search(r"`benchmarks/results/(ladder_(?:natural|digits)_cpu)/`", section)[1])
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    assert [of_arm(row)[0] for row in rows] == list(found.summary["arms"])
    for arm, shown in map(of_arm, rows):
        assert agree(shown, ladder_on_its_page(found, arm)), (arm, shown)


def test_the_front_page_says_what_the_comparisons_found():
    digits, ladder, wirings = map(Comparison, ("digits_cpu", "ladder_natural_cpu", "skipless_cpu"))
    rows = {cells[0]: cells[1] for cells in table("../README.md", "question")}
    structure = digits.against["mimetic", "norm-matched-mimetic"]["difference"]
    started = rows["Does a mimetic start train better?"]
    assert agree(started, [*digits.over_default("mimetic"), *points(structure)]), started
    gap = rows["Where does the gap to pre-training go?"].partition("([table]")[0]
    arms = ("pretrained", "pretrained-attention", "fitted")
    assert agree(gap, [number for arm in arms for number in ladder.over_default(arm)]), gap
    wired = re.findall(r"([\d.]+) %", rows["Can a ViT train without skips and norms?"])
    arms = ("no-skips-no-norms", "e-spa-no-skips-no-norms", "value-skipinit", "default")
    assert agree(" ".join(wired), [number for arm in arms for number in wirings.accuracy(arm)])


def test_the_inverse_is_as_far_from_draws_as_its_page_says():
    found = loaded("inverse.json")
    by_width = found["largest_by_embed_dim"]["realised"]
    for cells in table("inverse.md", "d | draws"):
        row, draws = by_width[cells[0]], {one["n"] for one in found["realised"] if one["embed_dim"] == int(cells[0])}
        largest = [max(row[name].values()) for name in ("standard_error", "spread")]
        assert agree(" ".join(cells[1:]), [*draws, row["error"]["alpha"], row["error"]["beta"], *largest]), cells


def test_intervals_of_a_share_cover_as_often_as_the_page_says():
    found = loaded("gap_coverage.json")["coverage"]
    rows = table("training.md", "setting | Fieller, n = 3")
    assert {cells[0] for cells in rows} == {one["setting"] for one in found}
    for cells in rows:
        by_n = {one["n"]: one for one in found if one["setting"] == cells[0]}
        expected = [by_n[n][name] for name in ("fieller", "bootstrap") for n in (3, 6, 10)]
        assert agree(" | ".join(cells[1:]), expected), cells


def test_the_initialisers_are_as_fast_as_their_page_says():
    models = loaded("init_speed.json")["models"]
    names = ["ours", "svd_float32", "svd_float64"]
    *rows, ratios = table("inits.md", "mimetic, two threads")
    for cells, name in zip(rows, names, strict=True):
        expected = [model[f"{name}_{clock}"] for model in models for clock in ("wall", "cpu")]
        assert agree(" ".join(cells[1:]).replace(" s", ""), expected), cells
    shown = " ".join(ratios[1:]).replace("/", " ")
    assert agree(shown, [model[f"ratio_{kind}_wall"] for model in models for kind in ("float32", "float64")])


def test_a_large_model_takes_what_its_page_says():
    runs = {run["layers"]: run for run in loaded("trust.json")["scale"]["runs"]}
    rows = table("scale.md", "layers | parameters")
    assert [int(cells[0]) for cells in rows] == list(runs)
    for cells in rows:
        run = runs[int(cells[0])]
        size, attention = run["parameters"] / 1e9, run["attention_parameters"] / 1e9
        measured = [run["peak_above_imports_mb"], run["cpu_seconds"], run["cpu_seconds"] / attention, run["seconds"]]
        assert agree(" ".join(cells[1:]).replace(" B", "").replace(" MB", ""), [size, attention, *measured]), cells


@pytest.fixture(scope="module")
def real(dinov2_file):
    return attnlens.fit_params("vit_small_patch14_dinov2", checkpoint=dinov2_file)


@pytest.mark.slow
@pytest.mark.weights
def test_the_products_of_a_real_network_are_as_the_results_say(real):
    positive = {Verdict.IDENTITY, Verdict.IDENTITY_LOW_RANK}
    rows = table("results.md", "layer | QK heads `identity` or `identity + low rank`")
    assert [int(cells[0]) for cells in rows] == list(range(12))
    for layer, (_, heads, beta, interval, verdict, raw) in enumerate(rows):
        words = [entry.verdict in positive for entry in real.select("qk", layer=layer)]
        (total,), (stored,) = (real.select("ov", "all", layer, fold) for fold in ("effective", "raw"))
        assert heads == f"{sum(words)} of {len(words)}"
        assert agree(f"{beta} {interval}", [total.beta, total.beta_low, total.beta_high]), layer
        assert verdict == total.verdict
        assert agree(raw.partition(",")[0], [stored.beta]), layer
        assert raw.partition(", ")[2] == stored.verdict


@pytest.mark.slow
@pytest.mark.weights
def test_the_words_for_a_real_network_are_counted_as_the_page_of_verdicts_does(real):
    words = list(Verdict)
    rows = table("verdicts.md", "circuit | fold | identity")
    assert len(rows) == 9
    for circuit, fold, *counts in rows:
        kind, head = circuit[:2].lower(), "all" if circuit.endswith("sums") else "each"
        found = Counter(entry.verdict for entry in real.select(kind, head, fold=fold))
        assert list(map(int, counts)) == [found[word] for word in words], (circuit, fold)
        assert circuit.split()[1] == str(found.total())


def test_a_number_that_no_result_holds_is_seen():
    assert agree("+1.4 | +0.9 to +2.0 | .0097", [1.44, 0.86, 2.03, 0.00971])
    assert agree("1,212 | < .001", [1212.07, 0.0004])
    assert not agree("+1.4 | +0.9 to +2.0", [1.46, 0.86, 2.03])
    assert not agree("+1.4", [1.44, 0.86])
    assert not agree("< .001", [0.002])
    changed = Comparison("digits_cpu")
    changed.summary["arms"]["fitted"]["accuracy"]["mean"] += 0.001
    shown = dict(of_arm(cells) for cells in table("training.md", "arm | test accuracy, mean"))["fitted"]
    assert not agree(shown, digits_on_its_page(changed, "fitted"))
