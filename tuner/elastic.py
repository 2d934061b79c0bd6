"""Elastic: a scenario whose configs may be parts of its model, each with a trace and a loss of its own.

Where layers or experts are missing, later layers see other inputs, so that a part is recorded anew on the text that the
whole was recorded on. A loss that a study goes by is of the half of the held-out text that parts are chosen on; a
validation's is of the other half.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from cost_models.cluster import Cluster
from router.elastic.extract import choose_part, in_memory
from router.elastic.importance import losses_without, without
from router.nn.evaluate import STEP_SEQUENCES, HeldOutLoss, held_out_loss
from router.nn.record import record
from router.nn.store import TrainedModel, load_model
from router.nn.text import Use
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.subnetwork import SubNetwork
from sim.lower import Work
from sim.report import Report
from sim.timeline import Timeline
from traces.errors import InputError
from traces.trace import RoutingTrace
from tuner.clusters import make_cluster
from tuner.config import SubnetworkChoice
from tuner.replays import Replays, Window, load_trace, parts_of
from tuner.scenario import Config, Scenario, StudyChoice
from tuner.served import fit_space
from tuner.space import NONE
from tuner.weights import in_weights

_KEPT = 16  # replays of so many parts stay: each holds its trace and candidates
_LOSS_SEQUENCES = 128
_WINDOWS: dict[Use, Window] = {"record": "tune", "measure": "validate"}


@dataclass(frozen=True, kw_only=True)  # no slots: parts are chosen and recorded once and kept
class ElasticReplays:
    """An elastic scenario made ready: every part of its model is chosen, recorded and replayed when it is asked for.

    `given`: the scenario as written, but with its `config` in full; `whole`: its model.
    """

    given: Scenario
    whole: TrainedModel
    trace: RoutingTrace

    @classmethod
    def of(cls, scenario: Scenario) -> Self:
        """Read the model and the trace that the scenario names.

        Errors: `InputError` if there is no such model, it did not record the trace, or has not what `config` asks for.
        """
        assert scenario.elastic is not None
        assert isinstance(scenario.trace, Path)  # a scenario with a model has a recorded trace
        whole, trace = load_model(scenario.elastic), load_trace(scenario)
        if trace.text.get("model") != whole.key:
            raise InputError(
                f"{scenario.trace}: recorded by model {trace.text.get('model')}, {scenario.elastic} is {whole.key}; "
                f"record it with moeroute trace record --model {scenario.elastic}"
            )
        made = cls(given=scenario, whole=whole, trace=in_weights(trace, scenario.weights))
        try:
            config = made.in_full(scenario.config)
        except InputError as error:
            raise InputError(f"config.subnetwork: {error}") from error
        return replace(made, given=scenario.model_copy(update={"config": config}))

    @cached_property
    def scenario(self) -> Scenario:
        """The scenario, with a search space that model, trace and cluster can serve. Errors: `InputError`."""
        baseline = self.for_config(self.given.config)
        window = parts_of(self.given, self.trace)[1]
        fitted = fit_space(self.given, window, baseline.layout, baseline.no_steps)
        self._check_steps(fitted)
        return fitted

    @property
    def cluster(self) -> Cluster:
        """What it runs on."""
        return make_cluster(self.given)

    @property
    def model_id(self) -> tuple[str, ...]:
        """The model's key and the checksum of its weights."""
        return self.whole.key, str(self.whole.info["sha256"])

    def in_full(self, config: Config) -> Config:
        """The config with all that it leaves to the model: `top_k` of no part is a part too, of all layers and experts.

        So that one thing has one name. Errors: `InputError` for a part that the model has not.
        """
        choice = config.subnetwork
        if choice is None:
            if config.policy != TopK.name or config.weights != "renormalised":
                return config
            choice = SubnetworkChoice(top_k=config.parameters["k"])
        part = self.part_of(choice)
        full = SubnetworkChoice(depth=part.depth, experts=part.experts, top_k=part.top_k_L)
        return config.model_copy(update={"parameters": {}, "subnetwork": full})

    def part_of(self, choice: SubnetworkChoice | None) -> SubNetwork:
        """The part that is chosen at these sizes; None: all of the model."""
        if choice is None:
            return self.whole.model.config.whole
        if choice not in self._parts:
            self._parts[choice] = choose_part(
                self.whole.model,
                self.whole.corpus,
                layers=None if choice.depth is None else self._layers_of(choice.depth),
                experts=choice.experts,
                top_k=choice.top_k,
            )
        return self._parts[choice]

    def model_of(self, config: Config) -> TrainedModel:
        """The part that the config runs, as a model of its own."""
        part = self.part_of(config.subnetwork)
        return self.whole if part == self.whole.model.config.whole else in_memory(self.whole, part)

    def trace_of(self, config: Config) -> RoutingTrace:
        """The trace of the part that the config runs: the tokens of the scenario's trace, routed by the part."""
        model = self.model_of(config)
        if model is self.whole:
            return self.trace
        context, text = model.model.config.context, self.trace.text
        trace = record(model, tokens=int(text["sequences"]) * context, seed=int(text["seed"]))
        rows_T = self.trace.request_T.astype(np.int64) * context + self.trace.position_T
        return trace if np.array_equal(rows_T, np.arange(trace.tokens)) else trace.take(rows_T)

    def for_config(self, config: Config) -> Replays:
        """The replays of the part that the config runs. Errors: `InputError` where it does not fit the cluster."""
        kept, choice = self._replays, config.subnetwork
        found = kept.pop(choice, None) or Replays.of(self._scenario_of(config), self.trace_of(config))
        kept[choice] = found  # the last again
        for oldest in list(kept)[:-_KEPT]:
            del kept[oldest]
        return found

    def run(self, config: Config) -> tuple[Report, list[Timeline], list[tuple[Work, ...]]]:
        """Replay the tune window under one config."""
        return self.for_config(config).run(config)

    @property
    def study_loss(self) -> Callable[[Config], float]:
        """The loss that a study goes by, nats a byte."""
        return lambda config: self.held_out(config, use="record").mean

    def held_out(self, config: Config, *, use: Use) -> HeldOutLoss:
        """The loss of the part that the config runs, under its policy, on one half of the held-out text.

        A policy that looks at other tokens too sees steps as the scenario has them. Errors: `InputError` where these
        are no whole contexts.
        """
        policy, batch = config.routing_policy(), self.given.batch
        replays = self.for_config(config)
        window = replays.windows[_WINDOWS[use]]
        steps = (
            {"ranks": 1, "tokens_per_rank": STEP_SEQUENCES * self.whole.model.config.context}
            if _alone(policy)
            else {"ranks": replays.cluster.ranks, "tokens_per_rank": batch.tokens_per_rank}
        )
        return held_out_loss(
            self.whole.model,
            self.whole.corpus,
            policy,
            history=window.history,
            prices=window.prices(policy, replays.placement(config)),
            sequences=_LOSS_SEQUENCES,
            part=self.part_of(config.subnetwork),
            use=use,
            **steps,
        )

    def _check_steps(self, fitted: Scenario) -> None:
        """Raise `InputError` where a loss would be of steps that are no whole contexts, before anything is searched."""
        space, context = fitted.study.space, self.whole.model.config.context
        tokens, ranks = fitted.batch.tokens_per_rank, self.cluster.ranks
        searched = {"policies": [TopK.name], "adjustments": [NONE], "capacities": [NONE]}
        all_alone = all(getattr(space, field) == names for field, names in searched.items())
        if all_alone and _alone(fitted.config.routing_policy()):
            return
        if tokens % context or _LOSS_SEQUENCES % (ranks * tokens // context):
            raise InputError(
                f"batch.tokens_per_rank: {tokens}; the loss of policies that look at other tokens is of whole contexts "
                f"of {context}, {_LOSS_SEQUENCES} of them in whole steps; use another, or top_k alone: "
                "policies [top_k], adjustments [none] and capacities [none] in study.space"
            )

    def _layers_of(self, depth: int) -> tuple[int, ...]:
        """The layers of the part of this depth, each depth chosen from the one above it, once."""
        model, parts = self.whole.model, self._part_by_depth
        if not 1 <= depth <= model.config.layers:
            raise InputError(f"depth is {depth}; the model has {model.config.layers}: use 1 to {model.config.layers}")
        for deeper in range(min(parts), depth, -1):
            least = int(np.argmin(losses_without(model, self.whole.corpus, parts[deeper])))
            parts[deeper - 1] = without(parts[deeper], least)
        return parts[depth].layers_L

    def _scenario_of(self, config: Config) -> Scenario:
        """The scenario of one config alone, as that of the part that it runs, of which nothing is searched."""
        sampled, part = self.given.sampled_layers, self.part_of(config.subnetwork)
        of_part = {} if config.subnetwork is None else {"output_errors": None}  # a part's top k reads no errors
        return self.given.model_copy(
            update={
                "config": config,
                "elastic": None,
                "study": StudyChoice(),
                "sampled_layers": None if sampled is None else min(sampled, part.depth),
                **of_part,
            }
        )

    @cached_property
    def _parts(self) -> dict[SubnetworkChoice, SubNetwork]:
        """Parts so far."""
        return {}

    @cached_property
    def _part_by_depth(self) -> dict[int, SubNetwork]:
        """Parts of all experts so far, by depth."""
        whole = self.whole.model.config.whole
        return {whole.depth: whole}

    @cached_property
    def _replays(self) -> dict[SubnetworkChoice | None, Replays]:
        """Replays of the last parts that were asked for, in that order."""
        return {}


def _alone(policy: RoutingPolicy) -> bool:
    """Whether a token's experts hang on no other token: the k best ones."""
    return policy.selection.name == TopK.name and policy.adjustment is None and policy.capacity is None
