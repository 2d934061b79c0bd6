"""What a page shows as the quality of a study's configs: gate mass kept, or the loss of the scenario's model."""

from dataclasses import dataclass
from typing import Self

from tuner import html_page as h
from tuner.study import StudyResult, Trial

KEPT_IN_SUMMARY, LOST_IN_SUMMARY = 0.95, 0.05  # of the gate mass at least, of the baseline's loss at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a study goes by beside step time, in words and in the formats of its axis and of a table."""

    name: str
    column: str
    in_summary: str
    better: str
    hover: str
    tick_format: str

    @classmethod
    def of(cls, study: StudyResult) -> Self:
        """The loss of the scenario's model, where the study has it, or gate mass."""
        if study.by_loss:
            return cls(
                name="loss",
                column="Loss, nats a byte",
                in_summary=f"that loses at most {LOST_IN_SUMMARY:.0%} more than the baseline",
                better="further down loses less",
                hover="%{y:.3f} nats a byte",
                tick_format=".2f",
            )
        return cls(
            name="gate mass",
            column="Gate mass kept",
            in_summary=f"that keeps at least {KEPT_IN_SUMMARY:.0%} of it",
            better="further up keeps more of the router's score",
            hover="%{y:.1%} of gate mass",
            tick_format=".0%",
        )

    @staticmethod
    def value(trial: Trial) -> float:
        """Where it lies on the axis."""
        return trial.gate_mass if trial.loss is None else trial.loss

    def shown(self, trial: Trial) -> str:
        """In a cell of a table."""
        return h.percent(trial.gate_mass) if trial.loss is None else h.number(trial.loss, ".3f")
