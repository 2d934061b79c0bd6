"""`moeroute model` and `moeroute trace record --model`, on models that train in a moment."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moeroute.cli.app import app
from router.elastic import RECIPES
from router.elastic.co_activation import CoActivation
from router.nn import store
from router.nn import train as training
from router.nn.lm import LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.recipe import Rules
from router.nn.store import load_model
from router.nn.text import load_corpus
from router.nn.train import Hyperparameters
from traces.store import read_trace

SMALL = dict[str, Any](hidden=32, layers=3, heads=2, experts=8, expert_hidden=16, top_k=2, context=32)
STEPS = 6
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line with a small reference model, trained for a few steps, and an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(store, "LanguageModelConfig", lambda **shape: LanguageModelConfig(**(shape or SMALL)))
        patch.setattr(training, "Hyperparameters", _few_steps)
        patch.setattr(store, "load_corpus", cache(load_corpus))  # a second of each command, as is what times products
        patch.setattr(training, "_bfloat16_is_faster", lambda: False)
        yield lambda *arguments: CliRunner().invoke(app, ["model", *map(str, arguments)])


ASKED: list[dict[str, Any]] = []


def _few_steps(**given: Any) -> Hyperparameters:
    ASKED.append(given)
    Hyperparameters(**given)  # what was asked for must do by itself
    return Hyperparameters(**{**given, "steps": STEPS, "limit_s": None, "batch": 4})


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model by once_for_all."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    done = run("train", "--recipe", "once_for_all", "--seed", "3", "--budget", "5", "-o", folder)
    assert done.exit_code == 0, done.output
    return folder


def document(done: Result) -> Any:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(done: Result) -> str:
    """The last line that a refused command says; before it, at most how far it had come."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_help_names_every_recipe(run: Run) -> None:
    shown = " ".join(run("train", "--help").stdout.replace("│", " ").split())
    assert f"How to train: {', '.join(list(RECIPES)[:-1])} or {list(RECIPES)[-1]}." in shown


def test_a_model_is_trained_by_its_recipe_once(run: Run, whole: Path) -> None:
    assert ASKED[-1] == {"seed": 3, "steps": None, "limit_s": 5.0}
    info = load_model(whole).info
    assert (info["recipe"]["name"], info["hyperparameters"]["seed"], info["steps"]) == ("once_for_all", 3, STEPS)
    again = document(run("train", "--recipe", "once_for_all", "--seed", "3", "--budget", "5", "-o", whole, "--json"))
    assert not again["trained_now"]
    assert again["held_out"] == info["held_out"]


def test_without_options_it_is_the_reference_model(run: Run) -> None:
    found = document(run("train", "--json"))
    assert ASKED[-1] == {"seed": 0}
    assert (found["recipe"], found["spec"]["name"]) == ({"name": "plain"}, "reference")
    assert f"moeroute/models/{found['key']}" in found["path"]


def test_an_interrupted_training_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = 0
    draw = CoActivation.draw

    def counted(
        recipe: CoActivation, rule: TrainingRule, config: LanguageModelConfig, random: np.random.Generator
    ) -> Rules:
        nonlocal draws
        draws += 1
        if draws == 2 * 4 + 1:  # two parts of a batch a step
            raise KeyboardInterrupt
        return draw(recipe, rule, config, random)

    monkeypatch.setattr(CoActivation, "draw", counted)
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", 0.0)
    command = ("train", "--recipe", "emoe", "-o", tmp_path / "model", "--json")
    stopped = run(*command)
    assert stopped.exit_code == 130
    assert "start again to go on" in stopped.stderr
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["checkpoint.pt"]
    draws = 100
    found = document(run(*command))
    assert found["steps"] == STEPS
    assert draws == 100 + 2 * (STEPS - 4)  # four steps were done before
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["info.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--recipe", "elastic"), "unknown recipe 'elastic'; known are plain, larger_k, emoe"),
        (("--budget", "0"), "--budget is 0; give seconds, more than 0"),
        (("--budget", "inf"), "--budget is inf; give seconds"),
    ],
)
def test_a_training_that_cannot_be_is_refused(run: Run, options: tuple[str, ...], says: str) -> None:
    assert says in refused(run("train", *options))


def test_another_model_in_the_folder_is_replaced_only_if_told(run: Run, tmp_path: Path) -> None:
    document(run("train", "-o", tmp_path, "--json"))
    assert "holds another model" in refused(run("train", "--seed", "1", "-o", tmp_path))
    assert document(run("train", "--seed", "1", "-o", tmp_path, "--retrain", "--json"))["trained_now"]


def test_a_part_is_extracted_evaluated_and_recorded(run: Run, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "part"
    sizes = ("--depth", "2", "--experts", "4", "--top-k", "1")
    cut = document(run("extract", whole, *sizes, "--by", "reap", "--domain", "code", "-o", out, "--json"))
    assert [len(cut["part"]["layers"]), len(cut["part"]["experts"][0]), cut["part"]["top_k"]] == [2, 4, [1, 1]]
    assert (cut["by"], cut["domain"], cut["of_layers"], cut["of_experts"]) == ("reap", "code", 3, 8)
    assert cut["after"]["parameters"] < cut["before"]["parameters"]
    assert cut["after"]["weight_bytes"] == 4 * cut["after"]["parameters"]
    assert cut["before"]["total_share"] == 1
    assert load_model(out).part.to_json() == cut["part"]

    found = document(run("eval", out, "--json"))
    assert found["part"] == cut["part"]
    assert found["size"] == cut["after"]
    assert found["loss"]["all"]["mean"] == pytest.approx(cut["loss"]["all"]["after"])
    assert [point["top_k"] for point in found["curve"]] == [1, 2, 4]
    assert found["curve"][0]["difference"] == 0  # its own k
    assert found["cpu_step_s"] > 0
    deployed = found["deployed"]
    assert (deployed["shape"], deployed["layers"]) == ("mixtral-8x7b", 21)  # two thirds of 32
    assert 0 < deployed["step_s"] < 1

    recorded = CliRunner().invoke(
        app, ["trace", "record", "--model", str(out), "--tokens", "1280", "-o", str(tmp_path), "--json"]
    )
    assert document(recorded)["tokens"] == 1280
    trace = read_trace(tmp_path / "trace.parquet")
    assert (trace.model.layers, trace.model.experts, trace.text["model"]) == (2, 4, cut["key"])


def test_what_is_printed_names_what_is_kept(run: Run, whole: Path, tmp_path: Path) -> None:
    done = run("extract", whole, "--experts", "3", "-o", tmp_path)
    assert done.exit_code == 0, done.output
    lines = [line.split("│") for line in done.stdout.splitlines()]
    kept = {cells[1].strip(): cells[3].split() for cells in lines if len(cells) == 5 and cells[2].strip() == "2"}
    part = load_model(tmp_path).part
    assert kept == {str(layer): [*map(str, row)] for layer, row in enumerate(part.experts_LE)}
    shown = run("eval", tmp_path, "--top-ks", "1,3").stdout
    assert "of CPU time, one thread" in shown
    assert "on 8 H100 at the widths of mixtral-8x7b (32 layers of 3 experts)" in shown


def test_a_part_of_the_reference_model_layer_by_layer(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    file.write_text('{"layers": [0, 2], "top_k": [2, 1]}')
    cut = document(run("extract", "--per-layer", file, "--experts", "4", "-o", tmp_path / "part", "--json"))
    assert (cut["part"]["layers"], cut["part"]["top_k"]) == ([0, 2], [2, 1])
    file.write_text('{"top_k": [1, 1], "experts": [[0, 1], [2, 3]]}')
    again = document(run("extract", tmp_path / "part", "--per-layer", file, "-o", tmp_path / "again", "--json"))
    first = cut["part"]["experts"]
    assert again["part"]["experts"] == [first[0][:2], first[1][2:]]  # by the whole model's numbers
    assert again["before"]["parameters"] == cut["after"]["parameters"]


def test_a_step_that_cannot_be_simulated_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMALL, "experts", 6)
    assert run("train", "-o", tmp_path).exit_code == 0
    found = document(run("eval", tmp_path, "--json"))
    assert found["deployed"] == {
        "why_not": "no published model that is simulated has 6 experts a layer; a model of 8 or 16 can be deployed"
    }
    assert "no simulated decode step: no published model" in run("eval", tmp_path).stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "nothing to cut; give --depth, --experts, --top-k or --per-layer"),
        (("--depth", "9"), "depth is 9; the model has 3: use 1 to 3"),
        (("--experts", "4", "--by", "size"), "--by is 'size'; use gate_mass or reap"),
        (("--depth", "2", "--domain", "code"), "--domain code chooses experts; say how many to keep with --experts"),
        (("--experts", "4", "--domain", "poems"), "no domain 'poems' in the text"),
        (("--per-layer", "nowhere.json"), "nowhere.json: No such file"),
    ],
)
def test_a_part_that_cannot_be_is_refused(run: Run, whole: Path, options: tuple[str, ...], says: str) -> None:
    assert says in refused(run("extract", whole, *options))


def test_what_option_and_file_both_say_is_refused(run: Run, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    file.write_text('{"layers": [0, 2]}')
    says = refused(run("extract", whole, "--per-layer", file, "--depth", "2", "-o", tmp_path))
    assert "--depth is given, and" in says
    assert says.endswith("layers.json says it too; give one of them")


@pytest.mark.parametrize(
    ("top_ks", "says"),
    [("1,x", "--top-ks is '1,x'; give whole numbers with commas"), ("9", "top k of the curve is 9")],
)
def test_a_curve_that_cannot_be_is_refused(run: Run, whole: Path, top_ks: str, says: str) -> None:
    assert says in refused(run("eval", whole, "--top-ks", top_ks))


def test_a_folder_without_a_model_is_refused(run: Run, tmp_path: Path) -> None:
    for command in (("eval", tmp_path), ("extract", tmp_path, "--depth", "1")):
        assert "no trained model; make one with moeroute model train -o" in refused(run(*command))
