"""Cluster files: a custom cluster as a YAML file."""

import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cost_models.cluster import PRESET_CLUSTERS, Cluster, Fabric, Link, gpu_cluster
from cost_models.degrade import degrade
from cost_models.devices import DEVICES, Device, device
from cost_models.topology import Tier
from traces.errors import InputError, first_problem

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_NOT_KERNELS = {"scale_up", "scale_out", "ranks_per_node", "host_bandwidth", "memory_bytes"}


class _DeviceFile(_Strict):
    """A device of its own, or a known one (`base`) with other figures."""

    base: str | None = None
    name: str | None = None
    memory_bytes: Positive | None = None
    memory_bandwidth: Positive | None = None
    peak_flops: dict[float, Positive] | None = None
    scale_up: Positive | None = None
    scale_out: Positive | None = None
    ranks_per_node: int | None = Field(default=None, ge=1)
    sms: int | None = Field(default=None, ge=1)
    l2_bytes: Positive | None = None
    host_bandwidth: Positive | None = None
    kernels_of: str | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        self.device()
        return self

    def device(self) -> Device:
        """Figures not given are those of `base`; its kernels hold where only links or the size of its memory differ."""
        given = self.model_dump(exclude={"base"}, exclude_none=True)
        if self.base is not None:
            sheet = device(self.base)
            if not given:
                return sheet
            same_silicon = given.keys() <= _NOT_KERNELS | {"name"}
            told = {"name": f"custom {self.base}", "kernels_of": sheet.measured_as if same_silicon else ""} | given
            return replace(sheet, **told)
        missing = [f.name for f in fields(Device) if f.default is MISSING and f.name not in given]
        if missing:
            raise ValueError(f"without a base it needs {', '.join(missing)} too; bases are {', '.join(DEVICES)}")
        return Device(**given)


class _LinkFile(_Strict):
    """One link of a custom network; both ways unless told."""

    from_: str = Field(alias="from")
    to: str
    bandwidth_bytes_s: Positive
    latency_s: Seconds = 0.0
    tier: Tier = "scale_up"
    both_ways: bool = True


class _ClusterFile(_Strict):
    """A custom cluster: a fabric, links of its own, or both."""

    name: str | None = None
    device: Annotated[_DeviceFile, BeforeValidator(lambda v: {"base": v} if isinstance(v, str) else v)]
    ranks: int = Field(ge=1)
    ranks_per_node: int | None = Field(default=None, ge=1)
    fabric: Fabric | None = None
    oversubscription: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    host: bool = True
    latency_s: dict[Tier, Seconds] = Field(default_factory=dict)
    links: list[_LinkFile] = Field(default_factory=list)
    degrade: list[str] = Field(default_factory=list)


def read_cluster(path: Path) -> Cluster:
    """Read a custom cluster; `InputError` names the file, the field, the value and the mend.

    `device` is a datasheet's name, or a mapping: `base` and what differs from it, or all fields of `Device`. `ranks`,
    and `ranks_per_node` if not the device's. `fabric`, `oversubscription`, `host` and `latency_s` (by tier) as for
    `gpu_cluster`. `links`, each from, to, bandwidth_bytes_s, latency_s, tier and both_ways (true), add to the fabric,
    in place of a link that joins the same two; with links and without a fabric there is nothing else. Ranks are gpu0,
    gpu1, …, other ends have any name. `degrade` as in `degrade`.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such cluster file; presets are {', '.join(PRESET_CLUSTERS)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a mapping with device, ranks, …; found {type(document).__name__}")
    try:
        return _build(_ClusterFile.model_validate(document), path.stem)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from error
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def _build(file: _ClusterFile, stem: str) -> Cluster:
    sheet = file.device.device()
    if file.ranks_per_node is not None:
        sheet = replace(sheet, ranks_per_node=file.ranks_per_node)
    if file.fabric is None and file.links:
        idle = {"oversubscription", "host", "latency_s"} & file.model_fields_set
        if idle:
            raise InputError(f"{min(idle)}: of a fabric, and there are only links; name a fabric, or remove it")
        base = Cluster.of_links(
            [],
            name=stem,
            ranks=file.ranks,
            device=sheet,
            node_of_G=np.arange(file.ranks) // sheet.ranks_per_node,
        )
    else:
        base = gpu_cluster(
            sheet,
            file.ranks,
            fabric=file.fabric or "rail",
            oversubscription=file.oversubscription,
            host=file.host,
            latency_s=file.latency_s,
        )
    links = [link for index, given in enumerate(file.links) for link in _links(given, f"links.{index}", file.ranks)]
    cluster = base.with_links(links, name=file.name or base.name)
    _ = cluster.routes
    return degrade(cluster, file.degrade) if file.degrade else cluster


def _links(file: _LinkFile, field: str, ranks: int) -> list[Link]:
    """The link that a file names, and the one back."""
    one, two = _end(file.from_, f"{field}.from", ranks), _end(file.to, f"{field}.to", ranks)
    if one == two:
        raise InputError(f"{field}.to: {file.to!r} is where the link starts; name another end")
    return [
        Link(tail=tail, head=head, bandwidth_bytes_s=file.bandwidth_bytes_s, latency_s=file.latency_s, tier=file.tier)
        for tail, head in ((one, two), (two, one))[: 1 + file.both_ways]
    ]


def _end(name: str, field: str, ranks: int) -> object:
    number = re.fullmatch(r"(?:gpu|rank)(\d+)", name)
    if number is None and re.fullmatch(r"[A-Za-z][\w.:]*", name):
        return name
    if number is None or int(number[1]) >= ranks:
        raise InputError(
            f"{field}: {name!r} is no end of a link; ranks are gpu0 to gpu{ranks - 1}, "
            "other names are letters, digits and . : _"
        )
    return int(number[1])
