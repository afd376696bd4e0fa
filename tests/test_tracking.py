"""`StructureTracker` in a plain loop, in Lightning and in transformers' Trainer: the same numbers as `inspect`."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import attnlens
from attnlens.errors import AttnlensError, UnsupportedAttentionError, UsageError
from tests.training_setup import SHAPE, compare, small, write_source


def network(seed=0):
    return SHAPE.build(seed)


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(5, 1, 8, 8, generator=generator), torch.randint(0, 10, (5,), generator=generator))
        for _ in range(count)
    ]


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for images, labels in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "structure.jsonl").read_text().splitlines()]


def inspected(model, fold="effective"):
    """Return OV beta of every layer, and QK beta's mean over heads, as `inspect` gives them."""
    stats = attnlens.inspect(model, fold=fold).stats
    rows = list(stats.records())
    depth = max(row["layer"] for row in rows) + 1
    ov = [row["beta"] for row in rows if row["circuit"] == "ov" and row["head"] == "all"]
    qk = [np.mean([row["beta"] for row in rows if row["circuit"] == "qk" and row["layer"] == i]) for i in range(depth)]
    return ov, qk


def assert_measures(line, model):
    ov, qk = inspected(model)
    assert line["structure"]["effective"]["ov_beta"] == pytest.approx(ov, rel=1e-5)
    assert line["structure"]["effective"]["qk_beta"] == pytest.approx(qk, rel=1e-5)


def test_a_plain_loop_gets_a_line_an_epoch_that_is_what_inspect_says(tmp_path):
    model = network()
    tracker = attnlens.StructureTracker(model, tmp_path)
    tracker.update()
    for epoch in range(2):
        train(model)
        tracker(epoch + 1)
        assert_measures(lines_of(tmp_path)[-1], model)
        assert (tmp_path / "structure.png").stat().st_size > 10_000
    lines = lines_of(tmp_path)
    assert [(line["run"], line["epoch"]) for line in lines] == [("training", 0), ("training", 1), ("training", 2)]
    betas = [line["structure"]["raw"]["ov_beta"] for line in lines]
    assert betas[0] != betas[1] != betas[2]
    table = tracker.table()
    assert len(table) == 3 * 2 * SHAPE.depth
    assert table.select(fold="raw", epoch=2, layer=1).column("ov_beta").tolist() == [betas[2][1]]


def test_lines_are_those_train_compare_writes(tmp_path):
    source = write_source(tmp_path)
    compare(None, tmp_path / "out", options=small(source, arms=("default",), seeds=1, epochs=1), save_weights=True)
    written = lines_of(tmp_path / "out")
    assert [(line["run"], line["epoch"]) for line in written] == [("default-0", 0), ("default-0", 1)]
    from safetensors.torch import load_file

    model = network()
    model.load_state_dict(load_file(tmp_path / "out" / "weights" / "default-0.safetensors"))
    attnlens.StructureTracker(model, tmp_path / "own", run="default-0").update(1)
    assert lines_of(tmp_path / "own") == written[1:]


def test_tracking_changes_nothing_of_the_training(tmp_path):
    torch.manual_seed(3)
    model, alone = network(), network()
    before = torch.get_rng_state()
    tracker = attnlens.StructureTracker(model.train(), tmp_path)
    tracker.update()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    for one in (model, alone):
        train(one)
    tracker.update()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True))


def test_a_run_is_not_overwritten_and_gone_on_with_where_asked(tmp_path):
    model = network()
    tracker = attnlens.StructureTracker(model, tmp_path)
    for epoch in range(4):
        tracker.update(epoch)
    with pytest.raises(UsageError, match=r"structure.jsonl holds a run already: pass resume=True to go on, or another"):
        attnlens.StructureTracker(model, tmp_path)
    train(model)
    again = attnlens.StructureTracker(model, tmp_path, resume=True)
    again.update(2)
    assert [line["epoch"] for line in lines_of(tmp_path)] == [0, 1, 2]
    assert_measures(lines_of(tmp_path)[2], model)
    again.update()
    assert [line["epoch"] for line in lines_of(tmp_path)] == [0, 1, 2, 3]
    (tmp_path / "structure.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(AttnlensError, match=r"structure.jsonl cannot be read"):
        attnlens.StructureTracker(model, tmp_path, resume=True)


def test_wrapped_models_are_tracked_as_what_they_wrap(tmp_path):
    model = network()
    plain = attnlens.StructureTracker(model, tmp_path / "plain").update()
    for number, wrapped in enumerate((nn.DataParallel(model), torch.compile(model), nn.Sequential(model))):
        assert attnlens.StructureTracker(wrapped, tmp_path / str(number)).update() == plain


def test_networks_without_attention_and_things_that_are_no_network_are_refused(tmp_path):
    with pytest.raises(UnsupportedAttentionError):
        attnlens.StructureTracker(nn.Sequential(nn.Linear(3, 3)), tmp_path)
    with pytest.raises(UsageError, match="a str"):
        attnlens.StructureTracker("vit", tmp_path)


def test_only_the_first_of_several_processes_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("attnlens.training.tracking._leads", lambda: False)
    tracker = attnlens.StructureTracker(network(), tmp_path / "out")
    assert tracker.update()["raw"]["ov_beta"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "package"), [("lightning", "lightning"), ("transformers", "transformers")])
def test_a_callback_without_its_package_says_what_to_install(tmp_path, monkeypatch, kind, package):
    for name in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("attnlens.training.callbacks.import_module", lambda name: __import__(f"no_such_{name}"))
    tracker = attnlens.StructureTracker(network(), tmp_path)
    with pytest.raises(UsageError, match=f"is not installed: pip install {package}"):
        getattr(tracker, kind)()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_lightning_measures_before_the_first_epoch_and_after_each(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="the package lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, _index):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    tracker = attnlens.StructureTracker(module, tmp_path / "structure")
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[tracker.lightning()], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    lines = lines_of(tmp_path / "structure")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert_measures(lines[0], network())
    assert_measures(lines[-1], module.network)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_trainer_of_transformers_measures_before_the_first_epoch_and_after_each(tmp_path):
    pytest.importorskip("accelerate", reason="the package accelerate, which the Trainer needs, is not installed")
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    settings = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=10)
    model = transformers.ViTForImageClassification(settings)
    first = inspected(model)[0]
    pairs = [pair for images, labels in batches() for pair in zip(images, labels, strict=True)]
    data = [{"pixel_values": image, "labels": label} for image, label in pairs]
    tracker = attnlens.StructureTracker(model, tmp_path / "structure")
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=5, report_to="none",
            save_strategy="no", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, learning_rate=1e-2,
        ),
        train_dataset=data,
        callbacks=[tracker.transformers()],
    )  # fmt: skip
    trainer.train()
    lines = lines_of(tmp_path / "structure")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[0]["structure"]["effective"]["ov_beta"] == pytest.approx(first, rel=1e-5)
    assert_measures(lines[-1], model)
    assert lines[0]["structure"] != lines[-1]["structure"]
