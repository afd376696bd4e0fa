"""``--config``: the file a run writes repeats it, the command line counts more, and nothing unknown is passed over."""

import json

import pytest

from tests.training_setup import write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


def told(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_runs_own_configuration_repeats_it_and_the_command_line_counts_more(run, source, tmp_path):
    options = {
        "--model": source, "--arms": "default,mimetic", "--contrasts": "mimetic:default", "--seeds": 1, "--epochs": 2,
        "--batch-size": 40, "--patch-size": 4, "--train-images": 80, "--test-images": 40, "--augment": "shift",
        "--tune-lr": "1e-3,2e-3", "--tune-seeds": 1, "--label-smoothing": 0.1, "--optimizer": "sgd", "--device": "cpu",
    }  # fmt: skip
    words = [str(part) for pair in options.items() for part in pair]
    assert run("train-compare", *words, "-o", "first").code == 0
    assert run("train-compare", "--config", "first/config.json", "-o", "second").code == 0
    first, second = told(tmp_path / "first"), told(tmp_path / "second")
    assert first["sha256"] == second["sha256"]
    assert second["options"] == first["options"]
    done = run("train-compare", "--config", "first/config.json", "--seeds", 2, "--tune-lr", "3e-3", "-o", "third")
    assert done.code == 0, done.err
    third = told(tmp_path / "third")
    assert (third["seeds"], third["lr_grid"], third["recipe"]["label_smoothing"]) == (2, [0.003], 0.1)
    again = run("train-compare", "--config", "first/config.json", "-o", "first", "--resume")
    assert again.code == 0, again.err


def test_a_file_by_hand_names_options_as_the_command_does(run, source, tmp_path):
    by_hand = {
        "model": str(source), "arms": ["default"], "seeds": 1, "epochs": 1, "batch-size": 40, "patch_size": 4,
        "train-images": 80, "device": "cpu", "contrasts": [],
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(by_hand))
    done = run("train-compare", "--config", "mine.json", "-o", "out")
    assert done.code == 0, done.err
    assert told(tmp_path / "out")["recipe"]["batch_size"] == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"epocs": 3}', "names epocs, which is no option: choose from dataset, "),
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read"),
        ('{"sha256": "x", "dataset": "digits"}', "is of a version that kept no options"),
        ('{"epochs": "many"}', "Invalid value for '--epochs'"),
        ('{"config": "x.json"}', "names config, which is no option"),
        ('{"data_dir": {}}', "gives data_dir as {}: give text, a number or a list of them"),
        ('{"dataset": []}', "gives dataset as []"),
        ('{"arms": [[]]}', "gives arms as [[]]"),
        ('{"arms": ["default", {"a": 1}]}', 'gives arms as ["default", {"a": 1}]'),
        ('{"epochs": true}', "gives epochs as true"),
        ('{"resume": "no"}', 'gives resume as "no": give true or false'),
    ],
)
def test_what_is_no_file_of_options_is_refused_in_a_line(run, tmp_path, content, message):
    (tmp_path / "odd.json").write_text(content)
    done = run("train-compare", "--config", "odd.json", "-o", "out")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()
