"""Trained models in folders: the reference model in the user's cache, others where the user wants them.

A folder holds `model.safetensors`, `info.json`, which says how the model came about, and while it trains
`checkpoint.pt`.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from router.nn import lm, moe, recipe, train
from router.nn.evaluate import part_loss
from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.recipe import Plain, Recipe
from router.nn.text import Corpus, load_corpus
from router.nn.train import Hyperparameters
from router.subnetwork import SubNetwork
from traces.errors import InputError
from traces.files import replacing, write_json
from traces.model import ModelSpec
from traces.progress import Progress, quiet

_EVALUATED_SEQUENCES = 256
_WEIGHTS, _INFO, _CHECKPOINT = "model.safetensors", "info.json", "checkpoint.pt"
_DAMAGE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A trained model, or a part of one, with the text it was trained on.

    `path` is its folder, `key` what identifies it: a hash of its shape, hyperparameters, recipe, corpus and source
    code, or of the model that it is a part of, and the part. `info` says all of that, and has `steps`, `seconds`,
    `flops` and `loss` of training, and `held_out`, nats a byte by domain and of `all`; of a part, it has `part` and
    `of`, the model that it was cut from, in place of a training.
    """

    model: LanguageModel
    spec: ModelSpec
    corpus: Corpus
    path: Path
    key: str
    trained_now: bool
    info: dict[str, Any]

    @property
    def part(self) -> SubNetwork:
        """What this is of the model that it was cut from: all of it where it was not cut."""
        return SubNetwork.from_json(self.info["part"]) if "part" in self.info else self.model.config.whole

    @property
    def whole_config(self) -> LanguageModelConfig:
        """The shape of the model that it was cut from, or its own."""
        return _config(self.info["of"]["config"]) if "of" in self.info else self.model.config


def reference_model(
    *,
    retrain: bool = False,
    progress: Progress = quiet,
    config: LanguageModelConfig | None = None,
    hyper: Hyperparameters | None = None,
) -> TrainedModel:
    """The reference model: plainly trained, in the cache or trained now (about a minute on two cores).

    Everything as `trained_model` does it.
    """
    return trained_model(Plain(), retrain=retrain, progress=progress, config=config, hyper=hyper)


def trained_model(
    recipe: Recipe,
    *,
    retrain: bool = False,
    progress: Progress = quiet,
    config: LanguageModelConfig | None = None,
    hyper: Hyperparameters | None = None,
    folder: Path | None = None,
) -> TrainedModel:
    """The model that `recipe` gives, from its folder if it is there and whole, else trained now.

    `config` and `hyper` are the defaults where they are None, `folder` is one in the cache. A training that was stopped
    goes on. A damaged file is named to `progress` and the model trained again.
    Errors: `InputError` without a corpus, or where `folder` has another model and `retrain` is not set; `OSError` where
    the folder cannot be written.
    """
    config, hyper = config or LanguageModelConfig(), hyper or Hyperparameters()
    corpus = load_corpus()
    key = _key(config, hyper, recipe, corpus)
    if folder is not None and not retrain:
        check_not_another(folder, key, "or --retrain to replace it")
    folder = folder or Path(platformdirs.user_cache_dir("moeroute")) / "models" / key
    folder.mkdir(parents=True, exist_ok=True)
    name = "the reference model" if recipe.name == Plain.name else f"a model by {recipe.name}"
    weights_path, checkpoint = folder / _WEIGHTS, folder / _CHECKPOINT
    trained_now = retrain or not weights_path.exists()
    if not trained_now:
        try:
            model, info = _read(folder)
        except _DAMAGE as error:
            reason = " ".join(str(error).split())
            progress(0.0, f"{weights_path}: the model is damaged ({reason}); training it again")
            trained_now = True
    if trained_now:
        for shortage in corpus.left_out:
            progress(0.0, f"corpus domain left out: {shortage}")
        if retrain:
            checkpoint.unlink(missing_ok=True)
        model, run = train.train(config, corpus, hyper, progress, recipe=recipe, checkpoint=checkpoint, name=name)
        model.config = replace(config, top_k=recipe.own_top_k(config))
        info = write_model(
            folder,
            model,
            {
                **asdict(run),
                "key": key,
                "recipe": {"name": recipe.name, **_values(recipe)},
                "hyperparameters": asdict(hyper),
                "corpus": corpus.digest,
                "domains": list(corpus.domains),
            },
        )
        checkpoint.unlink(missing_ok=True)
    model.eval()
    if "held_out" not in info:
        progress(1.0, f"measuring {name} on held-out text")
        info = {**info, "held_out": held_out(model, corpus)}
        write_json(folder / _INFO, info)
    return TrainedModel(
        model=model,
        spec=model.spec(name="reference" if recipe.name == Plain.name else recipe.name),
        corpus=corpus,
        path=folder,
        key=key,
        trained_now=trained_now,
        info=info,
    )


def load_model(folder: Path) -> TrainedModel:
    """The model in a folder, of whatever recipe, whole or a part.

    Errors: `InputError` where there is none, it is damaged, or was trained on other text than this installation has.
    """
    if not (folder / _WEIGHTS).exists():
        if (folder / _CHECKPOINT).exists():
            raise InputError(f"{folder}: its training was stopped; start it again to go on")
        raise InputError(f"{folder}: no trained model; make one with moeroute model train -o {folder}")
    try:
        model, info = _read(folder)
        name, key, digest = str(info["recipe"]["name"]), str(info["key"]), info["corpus"]
        if "part" in info:
            SubNetwork.from_json(info["part"])
            _config(info["of"]["config"])
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: the model is damaged ({reason}); train or extract it again") from error
    corpus = load_corpus()
    if digest != corpus.digest:
        raise InputError(
            f"{folder}: trained on other text than this installation has, so that none is surely held out; "
            "train it here"
        )
    model.eval()
    return TrainedModel(
        model=model,
        spec=model.spec(name="reference" if name == Plain.name else name),
        corpus=corpus,
        path=folder,
        key=key,
        trained_now=False,
        info=info,
    )


def held_out(model: LanguageModel, corpus: Corpus) -> dict[str, float]:
    """The loss on held-out text, nats a byte, by domain and of `all`."""
    loss = part_loss(model, corpus, model.config.whole, sequences=_EVALUATED_SEQUENCES)
    return {**loss.by_domain, "all": loss.mean}


def write_model(folder: Path, model: LanguageModel, info: Mapping[str, Any]) -> dict[str, Any]:
    """Write a model's weights and what `info` says of it: the info with the model's shape and the weights' checksum."""
    with replacing(folder / _WEIGHTS) as temporary:
        save_file(model.state_dict(), temporary)
    write_json(folder / _INFO, {**info, "config": asdict(model.config), "sha256": _sha256(folder / _WEIGHTS)})
    return _read_info(folder)


def check_not_another(folder: Path, key: str, mend: str) -> None:
    """Raise `InputError` if the folder holds another model than that of `key`; `mend`: what else would help."""
    try:
        found = _read_info(folder)["key"]
    except (OSError, ValueError, TypeError, KeyError):
        return  # nothing there, or so damaged that nothing is lost
    if found != key:
        raise InputError(f"{folder}: holds another model ({found}); give another folder, {mend}")


def _read(folder: Path) -> tuple[LanguageModel, dict[str, Any]]:
    info = _read_info(folder)
    if info["sha256"] != _sha256(folder / _WEIGHTS):
        raise ValueError("its checksum differs from info.json")
    model = LanguageModel(_config(info["config"]))
    model.load_state_dict(load_file(folder / _WEIGHTS))
    return model, info


def _config(document: Mapping[str, Any]) -> LanguageModelConfig:
    shape: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in document.items()
    }
    return LanguageModelConfig(**shape)


def _read_info(folder: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((folder / _INFO).read_text(encoding="utf-8"))
    return info


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(config: LanguageModelConfig, hyper: Hyperparameters, of: Recipe, corpus: Corpus) -> str:
    described = [asdict(config), asdict(hyper), of.name, _values(of), corpus.digest]
    digest = hashlib.sha256(json.dumps(described).encode())
    for module in (lm, moe, recipe, train, inspect.getmodule(type(of))):
        assert module is not None
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]


def _values(of: Recipe) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in fields(of)}  # type: ignore[arg-type]  # leaves are dataclasses
