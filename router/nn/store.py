"""The reference model: trained once on this machine, then read from the user's cache folder."""

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from router.nn import lm, moe, train
from router.nn.evaluate import held_out_loss
from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.text import Corpus, load_corpus
from router.nn.train import Recipe
from traces.files import replacing, write_json
from traces.model import ModelSpec
from traces.progress import Progress, quiet

_EVALUATED_SEQUENCES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """A trained model with the text and the recipe it was trained on.

    `path` is its folder in the cache, `key` what identifies it there: a hash of its shape, recipe, corpus and source
    code. `info` has `steps`, `seconds`, `loss` (all of training) and `held_out`, nats a byte by domain.
    """

    model: LanguageModel
    spec: ModelSpec
    corpus: Corpus
    recipe: Recipe
    path: Path
    key: str
    trained_now: bool
    info: dict[str, Any]


def reference_model(
    *,
    retrain: bool = False,
    progress: Progress = quiet,
    config: LanguageModelConfig | None = None,
    recipe: Recipe | None = None,
) -> ReferenceModel:
    """The reference model, from the cache if it is there and whole, else trained now (about a minute on two cores).

    A damaged file is named to `progress` and the model trained again. `config` and `recipe` are the defaults where
    they are None.
    Errors: `InputError` without a corpus, `OSError` where the cache cannot be written.
    """
    config, recipe = config or LanguageModelConfig(), recipe or Recipe()
    corpus = load_corpus()
    key = _key(config, recipe, corpus)
    folder = Path(platformdirs.user_cache_dir("moeroute")) / "models" / key
    folder.mkdir(parents=True, exist_ok=True)
    weights_path, info_path = folder / "model.safetensors", folder / "info.json"
    trained_now = retrain or not weights_path.exists()
    if not trained_now:
        try:
            model, info = _read(weights_path, info_path, config)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            progress(0.0, f"{weights_path}: the cached model is damaged ({reason}); training it again")
            trained_now = True
    if trained_now:
        for shortage in corpus.left_out:
            progress(0.0, f"corpus domain left out: {shortage}")
        model, run = train.train(config, corpus, recipe, progress)
        with replacing(weights_path) as temporary:
            save_file(model.state_dict(), temporary)
        info = {**asdict(run), "sha256": _sha256(weights_path), "domains": list(corpus.domains)}
        write_json(info_path, info)
    model.eval()
    if "held_out" not in info:
        progress(1.0, "measuring the reference model on held-out text")
        loss = held_out_loss(
            model,
            corpus,
            config.policy,
            sequences=_EVALUATED_SEQUENCES,
            ranks=1,
            tokens_per_rank=16 * config.context,
        )
        info = {**info, "held_out": {**loss.by_domain, "all": loss.mean}}
        write_json(info_path, info)
    return ReferenceModel(
        model=model,
        spec=model.spec(),
        corpus=corpus,
        recipe=recipe,
        path=folder,
        key=key,
        trained_now=trained_now,
        info=info,
    )


def _read(weights_path: Path, info_path: Path, config: LanguageModelConfig) -> tuple[LanguageModel, dict[str, Any]]:
    info = json.loads(info_path.read_text(encoding="utf-8"))
    if info["sha256"] != _sha256(weights_path):
        raise ValueError("its checksum differs from info.json")
    model = LanguageModel(config)
    model.load_state_dict(load_file(weights_path))
    return model, info


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(config: LanguageModelConfig, recipe: Recipe, corpus: Corpus) -> str:
    digest = hashlib.sha256(json.dumps([asdict(config), asdict(recipe), corpus.digest]).encode())
    for module in (lm, moe, train):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]
