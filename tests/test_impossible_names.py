"""Names that no file can have, too long or with a null character: told as names of nothing, never as a traceback."""

from pathlib import Path

import pytest

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.inits.file import build, params_record
from attnlens.outputs import Outputs, model_identity, named_folder
from attnlens.strict_json import there
from attnlens.training.data.sources import load_dataset
from attnlens.training.data.text import load_text
from attnlens.training.store import stored_config

NAMES = {"long": "a" * 300, "deep": "x/" * 3000 + "x", "null": "b\0c"}
READERS = {
    "inspect": attnlens.inspect,
    "inspect a file": lambda name: attnlens.inspect(f"{name}.safetensors"),
    "inspect a folder": lambda name: attnlens.inspect(f"local-dir:{name}"),
    "inspect by names": lambda name: attnlens.inspect(f"{name}.safetensors", num_heads=2),
    "inspect weights": lambda name: attnlens.inspect("vit_tiny_patch16_224", name),
    "open": open_checkpoint,
    "fit": attnlens.fit_params,
    "compare": attnlens.compare,
    "scan": lambda name: attnlens.scan([name], "out"),
    "scan a folder": lambda name: attnlens.scan([f"{name}/"], "out"),
    "scan weights": lambda name: attnlens.scan([f"vit_tiny_patch16_224={name}"], "out"),
    "scan a list": lambda name: attnlens.scan([f"@{name}"], "out"),
    "parameters": attnlens.InitParams.load,
    "hash of parameters": lambda name: params_record(f"{name}.json"),
    "build": lambda name: build(name, 0, {}),
    "text": lambda name: load_text(f"text:{name}"),
    "text below": lambda name: load_text("text:x", data_dir=Path(name)),
    "images": load_dataset,
    "images below": lambda name: load_dataset("x", data_dir=Path(name)),
}
WRITERS = {
    "report": lambda name, _: attnlens.report(output=f"{name}.html"),
    "scan": lambda name, _: attnlens.scan(["vit_tiny_patch16_224"], output=name),
    "parameters": lambda name, params: params.save(f"{name}.json"),
    "folder": lambda name, _: named_folder(Path(name), ["a"], ["a"]),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reader", READERS)
def test_what_no_file_can_be_called_is_not_found(reader, name):
    with pytest.raises(attnlens.AttnlensError):
        READERS[reader](NAMES[name])


@pytest.fixture(scope="module")
def params():
    return attnlens.fit_params()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_no_file_can_be_called_is_not_written(writer, name, params, tmp_path):
    with pytest.raises(attnlens.AttnlensError, match="cannot write"):
        WRITERS[writer](NAMES[name], params)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", NAMES)
def test_looks_at_what_no_file_can_be_called_find_nothing(name):
    path = Path(NAMES[name])
    assert not any(there(look) for look in (path.is_file, path.is_dir, path.exists))
    assert Outputs.of(NAMES[name]).inputs == ()
    assert Outputs().folder(path) == path
    assert model_identity(NAMES[name]) == [NAMES[name]]
    assert stored_config(path) is None
