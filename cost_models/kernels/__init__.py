"""What GPU kernels take: one family of operations a file, as measured tables, physics and the learner see it."""

from cost_models.kernels import attention, collectives, exchange, experts, gemm, mla
from cost_models.kernels.base import Kernel, TableKind
from cost_models.ops import Operation
from traces.errors import InputError

FAMILIES = (experts, gemm, attention, mla, collectives, exchange)
TABLES: tuple[TableKind, ...] = tuple(kind for family in FAMILIES for kind in family.TABLES)


def kind_named(name: str) -> TableKind:
    """The kind of table of that name; `InputError` lists the known ones."""
    for kind in TABLES:
        if kind.name == name:
            return kind
    raise InputError(f"unknown kind of table {name!r}; known are {', '.join(kind.name for kind in TABLES)}")


def kernel_of(operation: Operation) -> Kernel:
    """A family that describes the operation, so that its datasheet bound can be had without a measurement."""
    return next(kind.kernel for kind in TABLES for op in kind.timings if kind.kernel.serves(operation, op=op))
