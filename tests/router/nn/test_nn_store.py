import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from router.nn.store import TrainedModel, reference_model
from tests.router.nn.conftest import SHORT

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
