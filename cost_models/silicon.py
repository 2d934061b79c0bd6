"""Measured tables of the package aiconfigurator-core (the extra `silicon`), which holds more than moeroute ships.

Its layout: systems/data/<gpu>/<area>/<framework>/<version>/<table>_perf.parquet.
"""

from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from cost_models.devices import DEVICES
from cost_models.kernels import TABLES
from cost_models.kernels.base import TableKind
from cost_models.tables import TableFile
from traces.errors import InputError

_PACKAGE = "aiconfigurator_core"


def installed_tables() -> Path:
    """The folder of the installed package's tables; `InputError` says how to install it."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError('fitting other GPUs needs their measured tables: pip install "moeroute[silicon]"')
    return Path(spec.submodule_search_locations[0]) / "systems" / "data"


def package_name() -> str:
    """The installed package and its version, for the record."""
    return f"aiconfigurator-core {metadata.version('aiconfigurator-core')}"


def find_silicon(
    folder: Path, gpu: str, *, framework: str | None = None, version: str | None = None
) -> list[TableFile]:
    """The tables of one GPU, of every framework or one, in a given version or each table's newest.

    Errors: `InputError` naming the GPUs, frameworks or versions that the folder holds.
    """
    known = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name in DEVICES)
    if gpu not in known:
        raise InputError(f"no measured tables of gpu {gpu!r}; those with tables and a datasheet are {', '.join(known)}")
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for kind_file in {kind.package_file for kind in TABLES if kind.package_file}:
        for path in sorted((folder / gpu).glob(f"*/*/*/{kind_file}")):
            found.setdefault((path.parts[-3], kind_file), {})[path.parts[-2]] = path
    frameworks = sorted({name for name, _ in found})
    if framework is not None and framework not in frameworks:
        raise InputError(f"no tables of framework {framework!r} on {gpu}; known are {', '.join(frameworks)}")
    files = []
    for (of_framework, kind_file), by_version in sorted(found.items()):
        if framework not in (None, of_framework):
            continue
        if version is None:
            files.append(_table(by_version[max(by_version, key=Version)], gpu, of_framework, kind_file))
        elif version in by_version:
            files.append(_table(by_version[version], gpu, of_framework, kind_file))
    if not files:
        versions = sorted({v for (name, _), by in found.items() if framework in (None, name) for v in by}, key=Version)
        raise InputError(f"no tables of version {version!r} on {gpu}; known are {', '.join(versions)}")
    return files


def _table(path: Path, gpu: str, framework: str, kind_file: str) -> TableFile:
    kind = _kind(kind_file, framework)
    stem = kind_file.removesuffix("_perf.parquet")
    name = f"{gpu}_{stem}" if stem == framework else f"{gpu}_{stem}_{framework}"
    return TableFile(name=name, path=path, kind=kind, device=DEVICES[gpu], framework=framework)


def _kind(kind_file: str, framework: str) -> TableKind:
    """The kind of a file: the framework's own, else that of another framework with the same columns."""
    kinds = [kind for kind in TABLES if kind.package_file == kind_file]
    kind = next((kind for kind in kinds if kind.framework == framework), kinds[0])
    return replace(kind, framework=framework)
