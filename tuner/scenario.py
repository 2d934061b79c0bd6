"""Scenario: the YAML file a user writes. What to replay, on what, how, and what to search.

Paths are relative to the scenario's own folder. An unknown key is an error, so that no typo passes for a default.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from cost_models.cluster import PRESET_CLUSTERS
from cost_models.devices import DEVICES, DTYPE_BYTES, known_dtype
from cost_models.kernel_profile import FRAMEWORKS
from sim.execution import GRAPH_BUCKETS, OVERLAP_PACE, Execution, Extent, Overlap
from sim.faults import Disturbance, Fault
from sim.lower import Protocol
from traces.errors import InputError, first_problem
from tuner.config import Config as Config
from tuner.config import Strict
from tuner.space import Space as Space

Count = Annotated[int, Field(ge=1)]
_TAGS = ("file", "synthetic", "kernels")  # which of its two forms a field has; not part of its name


class SyntheticTrace(Strict):
    """A made-up trace in place of a recorded one, for shapes that nobody has recorded."""

    model: str
    tokens: int = Field(gt=0)
    zipf: float = Field(ge=0)
    candidates: int | None = None


class ClusterChoice(Strict):
    """The ranks, what they are and how they reach each other, in one of three ways.

    `device` and `ranks`: a GPU by its datasheet's name, on a `fabric` between nodes whose leaves have
    `oversubscription` times as much bandwidth below as above; or `cpu` for processes of this host. `preset`: a cluster
    by name. `file`: a cluster of your own. `degrade`: what is slow or lost in it, as `gpu3=0.8`, `nic5-leaf5=0.5` or
    `rank7=lost`.
    """

    device: str | None = None
    ranks: int | None = Field(default=None, gt=0)
    preset: str | None = None
    file: Path | None = None
    fabric: Literal["rail", "fat_tree", "flat"] = "rail"
    oversubscription: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    degrade: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [self.device is not None or self.ranks is not None, self.preset is not None, self.file is not None]
        if sum(ways) != 1:
            raise ValueError("give device and ranks, or a preset, or a file")
        if ways[0] and (self.device is None or self.ranks is None):
            raise ValueError(f"{'ranks' if self.ranks is None else 'device'} is missing; add it")
        of_fabric = [
            name
            for name, is_set in (("fabric", self.fabric != "rail"), ("oversubscription", self.oversubscription != 1))
            if is_set
        ]
        if of_fabric and (not ways[0] or self.device == "cpu"):
            kind = "a preset" if self.preset else "a file" if self.file else "the cpu"
            raise ValueError(f"{of_fabric[0]} goes with a GPU's name and ranks, not with {kind}; remove it")
        if self.device not in (None, "cpu", *DEVICES):
            raise ValueError(f"unknown device {self.device!r}; known are cpu, {', '.join(DEVICES)}")
        if self.preset not in (None, *PRESET_CLUSTERS):
            raise ValueError(f"unknown preset {self.preset!r}; known are {', '.join(PRESET_CLUSTERS)}")
        return self


class LayoutChoice(Strict):
    """How ranks share the model; see `sim.layout.Layout`."""

    attention_tensor: int = Field(default=1, ge=1)
    expert_tensor: int = Field(default=1, ge=1)


class ExecutionChoice(Strict):
    """How an engine runs a step; see `sim.execution.Execution`."""

    extent: Extent = "whole"
    overlap: Overlap = "none"
    graph_buckets: list[Count] = Field(default=list(GRAPH_BUCKETS))
    launch_s: float = Field(default=5e-6, ge=0, allow_inf_nan=False)
    host_gap_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    comm_sms: int = Field(default=20, ge=1)
    overlap_pace: float = Field(default=OVERLAP_PACE, gt=0, le=1)
    kv_dtype: Literal["bfloat16", "fp8"] = "bfloat16"
    attention_dtype: str | None = None

    def execution(self) -> Execution:
        """The same for the simulator."""
        return Execution(**{**self.model_dump(), "graph_buckets": tuple(self.graph_buckets)})


class DisturbanceChoice(Strict):
    """What the event simulation adds; see `sim.faults.Disturbance`. Faults as `rank7=lost@0.012` (seconds)."""

    jitter: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    faults: list[str] = Field(default_factory=list)
    detect_s: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _faults_can_be_read(self) -> Self:
        for fault in self.faults:
            Fault.parse(fault)
        return self

    def disturbance(self, seed: int) -> Disturbance:
        """The same for the simulator."""
        return Disturbance(
            jitter=self.jitter, seed=seed, faults=tuple(map(Fault.parse, self.faults)), detect_s=self.detect_s
        )


class Batch(Strict):
    """How tokens form steps."""

    phase: Literal["prefill", "decode"]
    tokens_per_rank: int = Field(gt=0)
    steps: int = Field(gt=0)
    kv_tokens_per_rank: int = Field(default=0, ge=0)


class StudyChoice(Strict):
    """How long to search and how."""

    trials: int = Field(default=100, gt=0)
    sampler: Literal["tpe", "nsga2"] = "tpe"
    space: Space = Space()


class Windows(Strict):
    """How the trace's requests divide, in order and in proportion.

    Placements are planned on the first part, policies tuned on the second, and the winners validated on the third.
    """

    plan: float = Field(default=2, gt=0)
    tune: float = Field(default=3, gt=0)
    validate_: float = Field(default=3, gt=0, alias="validate")

    @property
    def shares(self) -> tuple[float, float, float]:
        """Plan, tune, validate."""
        return self.plan, self.tune, self.validate_


Kernels = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)]


def _form_of_costs(value: Any) -> str:
    if isinstance(value, list) or value in FRAMEWORKS:
        return "kernels"
    return "datasheet" if value == "datasheet" else "file"


class Scenario(Strict):
    """The whole file. `config` is the baseline.

    `costs` is `datasheet`, the path of a profile, or measured kernels: frameworks whose profiles come with moeroute,
    or paths of such profiles, in order of preference. `weights` is the format of the experts' weights, where they do
    not run in the model's own; `dispatch_dtype` that of dispatched tokens, where it is not the activations'.
    `candidates`: complete the trace to so many experts a token, guessed by a model fitted on the plan window.
    `sampled_layers`: simulate so many MoE layers, each for its neighbours too. `output_errors`: a file of
    `moeroute model errors`, for budgets of k by layer; without it the gate mass that is lost stands for the error.
    `elastic`: the folder of the model that recorded the trace, of `moeroute model train`: configs may then be a part of
    it (`subnetwork`), and a study's quality is its loss.
    """

    version: Literal[1]
    name: str
    trace: Annotated[
        Annotated[Path, Tag("file")] | Annotated[SyntheticTrace, Tag("synthetic")],
        Discriminator(lambda value: "synthetic" if isinstance(value, dict | SyntheticTrace) else "file"),
    ]
    candidates: Count | None = None
    cluster: ClusterChoice
    costs: Annotated[
        Annotated[Path, Tag("file")]
        | Annotated[Literal["datasheet"], Tag("datasheet")]
        | Annotated[Kernels, Tag("kernels")],
        Discriminator(_form_of_costs),
    ] = "datasheet"
    weights: str | None = None
    batch: Batch
    config: Config
    layout: LayoutChoice = LayoutChoice()
    execution: ExecutionChoice = ExecutionChoice()
    disturbance: DisturbanceChoice = DisturbanceChoice()
    protocol: Protocol = "per_expert"
    dispatch_dtype: Literal["bfloat16", "fp8", "nvfp4"] | None = None
    fidelity: Literal["analytic", "event"] = "event"
    sampled_layers: Count | None = None
    output_errors: Path | None = None
    elastic: Path | None = Field(default=None, exclude_if=lambda value: value is None)
    windows: Windows = Windows()
    study: StudyChoice = StudyChoice()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        for name in self.costs if isinstance(self.costs, list) else ():
            if name not in FRAMEWORKS and not name.endswith(".json"):
                raise ValueError(
                    f"costs: {name!r} is neither a .json profile nor a framework with measured kernels; "
                    f"those are {', '.join(FRAMEWORKS)}"
                )
        if self.weights is not None and not known_dtype(self.weights):
            raise ValueError(f"weights: unknown dtype {self.weights!r}; known are {', '.join(DTYPE_BYTES)}")
        return self

    @model_validator(mode="after")
    def _parts_have_a_model(self) -> Self:
        if self.elastic is None:
            for field, part in (
                ("config.subnetwork", self.config.subnetwork),
                ("study.space.subnetworks", self.study.space.subnetworks),
            ):
                if part is not None:
                    raise ValueError(f"{field}: a part of which model? Name its folder as elastic, or leave it out")
        elif not isinstance(self.trace, Path):
            raise ValueError("elastic: goes with a trace that the model recorded, not with a synthetic one")
        elif self.candidates is not None:
            raise ValueError("candidates: a model records all its experts; leave it out")
        return self


def read_scenario(path: Path) -> Scenario:
    """Read a scenario file; `InputError` names the file, the field, the value and what is wrong with it."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such scenario; examples/ has some to start from") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    scenario = parse_scenario(document, source=str(path))
    beside: dict[str, Any] = {
        field: path.parent / value
        for field in ("trace", "costs", "output_errors", "elastic")
        if isinstance(value := getattr(scenario, field), Path)
    }
    if scenario.cluster.file is not None:
        beside["cluster"] = scenario.cluster.model_copy(update={"file": path.parent / scenario.cluster.file})
    if isinstance(scenario.costs, list):
        beside["costs"] = [str(path.parent / c) if c.endswith(".json") else c for c in scenario.costs]
    return scenario.model_copy(update=beside)


def parse_scenario(document: Any, *, source: str) -> Scenario:
    """Check a scenario that was read; `source` names it in errors."""
    if not isinstance(document, dict):
        raise InputError(f"{source}: expected a mapping with version, name, trace, …; found {type(document).__name__}")
    try:
        return Scenario.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{source}: {first_problem(error, unnamed=_TAGS, whole=document)}") from error
