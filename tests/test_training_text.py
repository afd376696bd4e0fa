"""Texts as data, language models as arms, and a metric of which less is better."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from attnlens import gpt
from attnlens.errors import UsageError
from attnlens.training.comparison import best_lrs, train_compare
from attnlens.training.data.image_files import DatasetError
from attnlens.training.data.text import ResidentText, Text, load_text, split_text
from attnlens.training.figures import draw_curves, draw_structure
from attnlens.training.metrics import ACCURACY, BITS_PER_BYTE
from attnlens.training.networks.gpt import Gpt
from attnlens.training.record_schema import ResumeError, check_records
from attnlens.training.report import conclusion
from attnlens.training.statistics import contrasts, epochs_to
from tests.training_setup import config

CPU = torch.device("cpu")
SHAPE = Gpt(context=7, embed_dim=12, depth=2, num_heads=3)
ARMS = ("default", "mimetic", "mimetic-positive", "qk-only", "norm-matched", "e-spa-no-norms")


def text_at_hand():
    """Return a folder of text that scikit-learn ships: the descriptions of its data sets."""
    import sklearn

    return Path(sklearn.__file__).parent / "datasets" / "descr"


@pytest.fixture(autouse=True)
def _small_gpt(monkeypatch):
    sizes = {"vocab_size": 256, "context": 16, "embed_dim": 12, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(gpt, "PRESETS", {**gpt.PRESETS, "gpt-test": sizes})


def options(**changes):
    given = {
        "dataset": f"text:{text_at_hand()}",
        "model": "gpt-test",
        "arms": ARMS,
        "seeds": 2,
        "epochs": 2,
        "batch_size": 8,
        "lr": 3e-2,
        "context": 16,
        "train_images": 80,
        "test_images": 12,
        "device": "cpu",
    }
    return {**given, **changes}


def trained(folder, *, resume=False, **changes):
    return train_compare(**options(**changes), output=folder, quiet=True, command="test", resume=resume)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "out"
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"vocab_size": 256, "context": 16, "embed_dim": 12, "depth": 2, "num_heads": 2}
        patch.setattr(gpt, "PRESETS", {**gpt.PRESETS, "gpt-test": sizes})
        return trained(folder)


def counted(length):
    """Return a text whose every byte says where it stands, up to 250."""
    content = (np.arange(length) % 250 + 1).astype(np.uint8)
    train, test = split_text(content)
    return Text("counted", train, test, 1, "")


def test_the_last_tenth_of_the_bytes_is_the_test_part(tmp_path):
    content = bytes(range(1, 251)) * 5
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    found = load_text(f"text:{path}")
    assert found.train.tobytes() + found.test.tobytes() == content
    assert len(found.test) == 125
    assert found.name == "text:a.txt"


def test_folders_and_patterns_are_joined_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name, words in (("b/1.txt", "one"), ("a.md", "two"), ("c.rst", "three"), ("d.bin", "no\0text")):
        (tmp_path / name).write_text(words)
    whole = load_text(f"text:{tmp_path}")
    assert whole.train.tobytes() + whole.test.tobytes() == b"two\none\nthree"
    assert whole.files == 3
    some = load_text(f"text:{tmp_path}/**/*.txt")
    assert some.train.tobytes() + some.test.tobytes() == b"one"
    assert load_text("text:a.md", data_dir=tmp_path).train.tobytes() == b"two"
    assert whole.sha256() != some.sha256()


@pytest.mark.parametrize("length", [71, 700, 1003])
def test_every_byte_of_the_test_part_is_predicted_at_most_once_and_nearly_all_are(length):
    text = counted(length).cut(SHAPE.context, 10, None) if length > 80 else counted(10 * length)
    starts = text.test_starts(SHAPE.context)
    targets = (starts[:, None] + np.arange(SHAPE.context) + 1).ravel()
    assert len(set(targets)) == len(targets)
    assert targets.max() < len(text.test)
    assert len(text.test) - 1 - len(targets) < SHAPE.context
    few = text.cut(SHAPE.context, 10, 2).test_starts(SHAPE.context)
    assert few.tolist() == [starts[0], starts[-1]]


def resident_of(text, **changes):
    return ResidentText(text, config(network=SHAPE, **changes), CPU)


def test_targets_are_the_bytes_behind_the_inputs_and_windows_stay_in_their_part():
    text = counted(2000).cut(SHAPE.context, 60, None)
    data = resident_of(text)
    inputs, targets, stream = data.epoch(3, 1)
    assert inputs.shape == targets.shape == (60, SHAPE.context)
    assert torch.equal((inputs.int() % 250 + 1).to(torch.uint8), targets)
    assert torch.equal((data.test_inputs.int() % 250 + 1).to(torch.uint8), data.test_targets)
    assert data.epoch(3, 1).stream == stream
    assert len({data.epoch(seed, epoch).stream for seed in range(3) for epoch in range(3)}) == 9
    ends = resident_of(text.cut(SHAPE.context, 20_000, None)).epoch(0, 0)
    distinct = {bytes(row.tolist()) for row in ends.inputs[:, :2]}
    assert len(distinct) == 250  # windows begin everywhere


def test_bits_per_byte_are_the_loss_of_the_module_itself(whole):
    """The first record's figure, from timm's blocks run plainly over the windows of the test split."""
    text = load_text(f"text:{text_at_hand()}").cut(16, 80, 12)
    shape = whole.findings.config.network
    network = shape.build(0)
    starts = text.test_starts(16)
    windows = torch.from_numpy(np.stack([text.test[start : start + 17] for start in starts])).long()
    with torch.no_grad():
        loss = cross_entropy(network(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()
    first = whole.findings.curves["default"][0][0]
    assert first == (0, pytest.approx(loss / math.log(2), rel=1e-5))
    assert first[1] == pytest.approx(8, abs=0.1)  # 256 bytes, all alike


def test_a_stored_run_of_a_text_without_its_bits_is_refused(whole):
    settings = whole.findings.config
    records = [json.loads(line) for line in (whole.folder / "results.jsonl").read_text().splitlines()]
    run = [line for line in records if (line["arm"], line["seed"]) == ("default", 0)]
    assert check_records(run, settings, "here") == run
    for broken in ({**run[-1], "bits_per_byte": None}, {k: v for k, v in run[-1].items() if k != "bits_per_byte"}):
        with pytest.raises(ResumeError, match="holds an epoch without its test bits per byte"):
            check_records([*run[:-1], broken], settings, "here")


def test_a_link_that_leaves_a_folder_of_texts_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "own.txt").write_text("words " * 50)
    (tmp_path / "secret.txt").write_text("secret " * 50)
    assert len(load_text(f"text:{tmp_path / 'texts'}").train) == 270
    (tmp_path / "texts" / "out.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DatasetError, match=r"out\.txt is a link that leaves"):
        load_text(f"text:{tmp_path / 'texts'}")


def test_every_arm_learns_and_sees_the_same_windows(whole):
    for curves in whole.findings.curves.values():
        for curve in curves.values():
            assert curve[-1][1] < curve[0][1] - 0.3
    assert whole.findings.streams == {0: len(ARMS), 1: len(ARMS)}
    records = [json.loads(line) for line in (whole.folder / "results.jsonl").read_text().splitlines()]
    assert all(record["bits_per_byte"] == pytest.approx(record["test_loss"] / math.log(2)) for record in records)
    bytes_seen = 2 * 80 * 16
    total = whole.findings.config.text.train_bytes
    last = [record["effective_epochs"] for record in records if record["status"] == "finished"]
    assert last == pytest.approx([bytes_seen / total] * len(last))


def test_the_report_states_split_windows_arms_and_direction(whole):
    report = whole.report
    assert "## Test bits per byte at the last epoch" in report
    assert "Lower is better." in report
    assert "the last tenth of the bytes is the test part" in report
    assert "80 windows an epoch, drawn with replacement, and 12 test windows side by side" in report
    assert "| arm mimetic-positive | mimetic beta_ov=0.4 |" in report
    assert "| arm e-spa-no-norms | as rewired, e-spa attention, no norms |" in report
    assert "every arm starts from drawn weights" in report
    assert "what the structure adds to the scale" in report
    assert "image" not in report
    assert "accura" not in report
    head = (whole.folder / "summary.csv").read_text().splitlines()[0]
    assert head.startswith("arm,n,bits_per_byte,")
    summary = json.loads((whole.folder / "summary.json").read_text())
    assert (summary["metric"], summary["lower_is_better"]) == ("bits_per_byte", True)
    assert not (whole.folder / "params.json").exists()


def test_the_signs_of_the_two_mimetic_arms_are_opposite_at_the_start(whole):
    start = {arm: whole.findings.structure[arm][0][0][1]["raw"]["ov_beta"] for arm in ARMS[:3]}
    assert all(value < -0.3 for value in start["mimetic"])
    assert all(value > 0.3 for value in start["mimetic-positive"])
    assert all(abs(value) < 0.1 for value in start["default"])


def test_resuming_trains_nothing_anew_and_another_text_is_refused(whole, tmp_path):
    before = {path: path.read_bytes() for path in (whole.folder / "runs").iterdir()}
    assert trained(whole.folder, resume=True).findings.finished == whole.findings.finished
    assert before == {path: path.read_bytes() for path in (whole.folder / "runs").iterdir()}
    (tmp_path / "descr").mkdir()
    (tmp_path / "descr" / "a.txt").write_text("other words " * 200)
    with pytest.raises(UsageError, match="holds another comparison"):
        trained(whole.folder, resume=True, dataset=f"text:{tmp_path / 'descr'}")


def test_curves_are_drawn_in_bits_and_structure_without_a_source(whole):
    (axes,) = draw_curves(whole.findings).axes
    assert axes.get_ylabel() == "test bits per byte"
    line = next(line for line in axes.get_lines() if line.get_label() == "mimetic (n = 2)")
    assert line.get_ydata()[0] == pytest.approx(
        np.mean([curve[0][1] for curve in whole.findings.curves["mimetic"].values()])
    )
    panels = draw_structure(whole.findings, None, "gpt-test").axes
    assert [len(panel.get_lines()) for panel in panels] == [len(ARMS)] * 4


def test_lower_bits_are_called_better_and_reach_the_target():
    values = {"a": {s: 2.0 + 0.01 * s for s in range(6)}, "b": {s: 2.5 + 0.012 * s for s in range(6)}}
    (found,) = contrasts(values, [("a", "b")])
    assert found.difference.mean == pytest.approx(-0.5, abs=0.01)
    told = conclusion(found, 1, BITS_PER_BYTE)
    assert "a was better at predicting: -0.505 bits per byte" in told
    assert "a was less accurate" in conclusion(found, 1, ACCURACY)
    curve = {0: [(0, 8.0), (1, 3.0), (2, 2.0)], 1: [(0, 8.0), (1, 5.0), (2, 3.5)]}
    assert epochs_to("a", 3.0, curve, BITS_PER_BYTE).by_seed == {0: 1, 1: None}
    assert epochs_to("a", 4.0, curve, ACCURACY).by_seed == {0: 0, 1: 0}
    table = {"a": {1e-3: 2.0, 2e-3: 1.9, 4e-3: 1.9}}
    assert best_lrs(table, BITS_PER_BYTE) == {"a": 2e-3}
    assert best_lrs(table) == {"a": 1e-3}


def test_learning_rates_of_a_text_are_chosen_by_the_fewest_bits_on_the_end_of_its_training_part(tmp_path):
    text = load_text(f"text:{text_at_hand()}")
    split = text.tuning()
    assert split.train.tobytes() + split.test.tobytes() == text.train.tobytes()
    found = trained(tmp_path / "out", arms=("default",), seeds=1, tune_lr=[1e-6, 1e-2], tune_seeds=1)
    assert found.findings.lrs == {"default": 1e-2}
    assert "Bits per byte on a tenth of the training text" in found.report


def test_a_run_whose_bits_are_no_number_counts_as_diverged(tmp_path, monkeypatch):
    from attnlens.training import trainer as running

    original = running.initial_state

    def broken(arm, seed, shape, source):
        state = original(arm, seed, shape, source)
        return {**state, "head.weight": state["head.weight"] * float("inf")} if arm == "mimetic" else state

    monkeypatch.setattr(running, "initial_state", broken)
    found = trained(tmp_path / "out", arms=("default", "mimetic"), seeds=1, epochs=1)
    assert [arm for arm, _, _ in found.findings.diverged] == ["mimetic"]
    assert set(found.findings.finished["default"]) == {0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 4}, "patch_size is about images, and text:descr is text: leave it out"),
        ({"augment": "none"}, "augment is about images"),
        ({"model": "vit_tiny_patch16_224"}, "is text: name a language model, as in model='gpt-tiny'"),
        ({"context": 100_000}, "too few for a window of 100000 and the byte behind it"),
        ({"test_images": 100_000}, r"test_images=100000: the test split of text:descr has \d+ windows"),
        ({"batch_size": 81}, "batch_size=81 is more than the 80 training windows"),
        ({"dataset": "text:nothing/here.txt"}, "there is no such file or folder, and no file matches it as a pattern"),
        ({"arms": ("fitted",)}, "gpt-test has no weights it could be fitted in: give params a file"),
        ({"freeze_filters": True}, "freeze_filters=True: the network has no depthwise filters"),
    ],
)
def test_usage_errors_say_what_to_change(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as raised:
        trained(tmp_path / "out", **changes)
    assert "\n" not in str(raised.value)


def test_what_is_no_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"words\0more")
    with pytest.raises(DatasetError, match=r"a.bin holds bytes of value 0: that is no text"):
        load_text(f"text:{tmp_path / 'a.bin'}")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DatasetError, match="is empty"):
        load_text(f"text:{tmp_path / 'empty.txt'}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"it holds no file ending in \.txt"):
        load_text(f"text:{tmp_path / 'folder'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match="wikitext-103 needs the package datasets: pip install datasets, or train"):
        load_text("text:wikitext-103")
