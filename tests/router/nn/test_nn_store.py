import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from router.elastic.once_for_all import OnceForAll
from router.nn.recipe import Plain
from router.nn.store import TrainedModel, load_model, reference_model, trained_model
from router.nn.train import Hyperparameters
from tests.router.tiny import SHORT, TINY
from traces.errors import InputError

Again = Callable[[list[str]], TrainedModel]


@pytest.fixture
def again(reference: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Again:
    """Ask for the same model once more, from a copy of the cache at `tmp_path`; progress messages go to the list."""
    folder = tmp_path / "moeroute" / "models" / reference.key
    folder.mkdir(parents=True)
    for file in reference.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def ask(messages: list[str]) -> TrainedModel:
        found = reference_model(
            config=reference.model.config,
            hyper=SHORT,
            progress=lambda done, message: messages.append(message),
        )
        assert found.path == folder
        return found

    return ask


def test_a_model_is_trained_once(reference: TrainedModel, again: Again) -> None:
    messages: list[str] = []
    found = again(messages)
    assert reference.trained_now
    assert not found.trained_now
    assert messages == []
    assert found.info == reference.info
    for ours, theirs in zip(found.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_info_tells_how_the_model_came_about(reference: TrainedModel) -> None:
    assert reference.info["steps"] == SHORT.steps
    assert set(reference.info["held_out"]) == {*reference.corpus.domains, "all"}
    assert sorted(path.name for path in reference.path.iterdir()) == ["info.json", "model.safetensors"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", _flip),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000])),
        ("info.json", lambda path: path.write_text("{")),
        ("info.json", lambda path: path.write_text("[]")),
        ("info.json", lambda path: path.unlink()),
    ],
)
def test_a_damaged_cache_is_named_and_mended(
    reference: TrainedModel, again: Again, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    damage(tmp_path / "moeroute" / "models" / reference.key / name)
    messages: list[str] = []
    found = again(messages)
    assert found.trained_now
    assert "damaged" in messages[0]
    assert str(found.path) in messages[0]
    assert "\n" not in messages[0]
    assert not again([]).trained_now


def test_importing_does_not_train(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    subprocess.run([sys.executable, "-c", "import router.nn.train"], env=environment, check=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(reference: TrainedModel, tmp_path: Path) -> Path:
    """A folder of the user's with a copy of the reference model."""
    return Path(shutil.copytree(reference.path, tmp_path / "mine"))


def test_a_model_is_loaded_from_any_folder(reference: TrainedModel, folder: Path) -> None:
    found = load_model(folder)
    assert (found.key, found.info, found.spec) == (reference.key, reference.info, reference.spec)
    assert not found.model.training
    assert not found.trained_now
    assert found.part == reference.model.config.whole
    for ours, theirs in zip(found.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_in_a_users_folder_is_trained_once(reference: TrainedModel, folder: Path) -> None:
    found = trained_model(Plain(), config=TINY, hyper=SHORT, folder=folder)
    assert not found.trained_now
    assert (found.path, found.key) == (folder, reference.key)


@pytest.mark.parametrize(
    "given",
    [{"recipe": OnceForAll()}, {"hyper": replace(SHORT, seed=1)}, {"config": replace(TINY, top_k=1)}],
    ids=["recipe", "seed", "shape"],
)
def test_a_folder_with_another_model_is_kept(folder: Path, given: dict[str, Any]) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=r"mine: holds another model .*; give another folder, or --retrain"):
        trained_model(**{"recipe": Plain(), "config": TINY, "hyper": SHORT, **given}, folder=folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_retraining_replaces_another_model(reference: TrainedModel, folder: Path) -> None:
    hyper = Hyperparameters(steps=2, batch=4, seed=1)
    found = trained_model(OnceForAll(), config=TINY, hyper=hyper, folder=folder, retrain=True)
    assert found.trained_now
    assert found.key != reference.key
    assert load_model(folder).info["recipe"] == {"name": "once_for_all", "whole_share": 0.5}
    assert load_model(folder).spec.name == "once_for_all"


def _change(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        info = json.loads((folder / "info.json").read_text())
        (folder / "info.json").write_text(json.dumps({**info, **changes}))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "mine: no trained model; make one with moeroute model train -o"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "checkpoint.pt"), "was stopped; start it again"),
        (
            lambda folder: _flip(folder / "model.safetensors"),
            "mine: the model is damaged .*; train or extract it again",
        ),
        (lambda folder: (folder / "info.json").unlink(), "mine: the model is damaged"),
        (_change(config={"hidden": 32}), "mine: the model is damaged"),
        (_change(part={"layers": [0]}), "mine: the model is damaged .a sub-network is written as"),
        (_change(corpus="other"), "mine: trained on other text than this installation has"),
    ],
    ids=["none", "stopped", "weights", "no info", "shape", "part", "text"],
)
def test_what_is_no_model_is_refused(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)
