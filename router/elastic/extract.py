"""Extraction: choosing the part of a model to keep, without training, and keeping it as a model of its own."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.elastic.importance import Score, expert_importance, importance_text, losses_without, of_layers, without
from router.nn.lm import LanguageModel
from router.nn.store import TrainedModel, check_not_another, held_out, write_model
from router.nn.text import Corpus
from router.subnetwork import SubNetwork
from traces.errors import InputError


def choose_part(
    model: LanguageModel,
    corpus: Corpus,
    *,
    depth: int | None = None,
    layers: Sequence[int] | None = None,
    experts: int | None = None,
    top_k: int | Sequence[int] | None = None,
    by: Score = "gate_mass",
    domain: str | None = None,
) -> SubNetwork:
    """The part of these sizes (None: the model's own) that matters most.

    Layers go first, one at a time, each time the one whose absence costs the least loss, measured; then, of the layers
    that remain, the experts of the smallest score `by`, measured as the part runs, with its own k. `layers` are those
    that remain, in place of a `depth`. `top_k` is one k, or one for each layer that remains. With a `domain`, experts
    are judged by what they do for its text alone; layers by all text.

    Errors: `InputError` for a size that the model has not, or a domain that the text has not.
    """
    config = model.config
    if layers is not None and depth is not None:
        raise InputError(f"depth {depth} and layers {list(layers)} are both given; give one of them")
    for name, wanted, most in (("depth", depth, config.layers), ("experts", experts, config.experts)):
        if wanted is not None and not 1 <= wanted <= most:
            raise InputError(f"{name} is {wanted}; the model has {most}: use 1 to {most}")
    whole = config.whole
    kept = len(layers) if layers is not None else depth or config.layers
    experts = experts or config.experts
    if top_k is None:
        top_k_L = (min(whole.top_k_L),) * kept
    else:
        top_k_L = (top_k,) * kept if isinstance(top_k, int) else tuple(top_k)
    sized = SubNetwork(
        layers_L=tuple(range(kept) if layers is None else layers),
        experts_LE=(tuple(range(experts)),) * kept,
        top_k_L=top_k_L,
    )
    sized.check_within(config.layers, config.experts, config.null_experts)  # before anything is measured
    text_BS = importance_text(corpus, config.context, domain)
    part = keep_layers(model, corpus, kept) if layers is None else of_layers(whole, layers)
    if top_k is not None:
        part = replace(part, top_k_L=top_k_L)
    replace(sized, top_k_L=part.top_k_L).check_within(config.layers, config.experts, config.null_experts)
    if experts == config.experts:
        return part
    return keep_experts(part, expert_importance(model, text_BS, part).score_LE(by), experts)


def keep_layers(model: LanguageModel, corpus: Corpus, depth: int) -> SubNetwork:
    """All of the model but the layers that are missed least, taken away one after another until `depth` remain."""
    part = model.config.whole
    while part.depth > depth:
        part = without(part, int(np.argmin(losses_without(model, corpus, part))))
    return part


def keep_experts(part: SubNetwork, score_LE: NDArray[np.float64], experts: int) -> SubNetwork:
    """The part with the `experts` experts of the highest score in each layer; of equal ones those of lower id.

    >>> part = SubNetwork(layers_L=(0,), experts_LE=((1, 4, 6),), top_k_L=(1,))
    >>> keep_experts(part, np.array([[0.2, 0.1, 0.9]]), 2).experts_LE
    ((1, 6),)
    """
    best_LE = np.sort(np.argsort(-score_LE, axis=1, kind="stable")[:, :experts], axis=1)
    return replace(
        part,
        experts_LE=tuple(
            tuple(ids_E[place] for place in best_E)
            for ids_E, best_E in zip(part.experts_LE, best_LE.tolist(), strict=True)
        ),
    )


def extract(whole: TrainedModel, part: SubNetwork, folder: Path) -> TrainedModel:
    """Write the part into `folder` as a model of its own, with its loss on held-out text.

    Its `info` names the model that it is a part of, and the part; where `whole` is a part itself, these are of the
    model that it was cut from, so that cutting twice is cutting once. Errors: `InputError` where it is no part of
    `whole`, or `folder` holds another model.
    """
    cut = in_memory(whole, part)
    check_not_another(folder, cut.key, "or remove that one first")
    info = write_model(folder, cut.model, {**cut.info, "held_out": held_out(cut.model, cut.corpus)})
    return replace(cut, path=folder, info=info)


def in_memory(whole: TrainedModel, part: SubNetwork) -> TrainedModel:
    """The part as a model of its own, kept nowhere; its loss is not measured. `path` stays that of `whole`."""
    model = whole.model.extract(part)
    key = part_key(whole, part)
    info = {
        **{name: whole.info[name] for name in ("recipe", "corpus", "domains")},
        "key": key,
        "of": _origin(whole),
        "part": part.of(whole.part).to_json(),
    }
    return replace(whole, model=model, spec=model.spec(name=whole.spec.name), key=key, trained_now=False, info=info)


def part_key(whole: TrainedModel, part: SubNetwork) -> str:
    """What identifies a part: a hash of the key of the model that it was cut from, and of what it is of that one."""
    return hashlib.sha256(json.dumps([_origin(whole)["key"], part.of(whole.part).to_json()]).encode()).hexdigest()[:16]


def _origin(whole: TrainedModel) -> dict[str, Any]:
    """The model that parts of `whole` are parts of, in JSON."""
    if "of" in whole.info:
        found: dict[str, Any] = whole.info["of"]
        return found
    return {
        "key": whole.key,
        "path": str(whole.path.resolve()),
        "config": asdict(whole.model.config),
        "held_out": whole.info["held_out"],
    }
