"""A cost model that remembers what it was asked, and tells which operations a stage is made of."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import AllToAll, Collective, CostModel, Operation, Prediction, TokenExchange
from sim.stages import Stage

COLLECTIVES = (AllToAll, TokenExchange, Collective)


class Recorder(CostModel):
    """Prices the n-th operation that it is asked for at 2^n seconds, so that the bits of a sum say what is in it."""

    name = "recorder"
    included: frozenset[type] = frozenset()

    def __init__(self) -> None:
        self.asked: list[Operation] = []

    def predict(self, operation: Operation) -> Prediction:
        seconds = 2.0 ** len(self.asked)
        self.asked.append(operation)
        return Prediction.unmeasured(np.full((1,) if isinstance(operation, TokenExchange) else (1, 1), seconds))

    def seconds(self, operation: Operation) -> NDArray[np.float64]:
        return self.predict(operation).seconds_X

    def operations_of(self, stage: Stage) -> list[Operation]:
        """What a stage was priced as."""
        bits = int(stage.seconds_LG[0, 0])
        return [operation for place, operation in enumerate(self.asked) if bits >> place & 1]

    def operation_of(self, stages: Sequence[Stage], name: str) -> Operation:
        """The one operation of the stage of that name."""
        (operation,) = self.operations_of(next(stage for stage in stages if stage.name == name))
        return operation
