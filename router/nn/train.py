"""Training: one loop for all recipes, the same text in the same order each time, stopped and gone on with at will."""

import math
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from router.nn.flops import training_flops_per_token
from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.recipe import Plain, Recipe, Rules
from router.nn.text import Corpus
from router.nn.threads import one_thread
from traces.errors import InputError, MoerouteError
from traces.files import replacing
from traces.progress import Progress

_STEPS_BETWEEN_REPORTS = 10
# The first steps are slow, and the clock is never the same twice: it counts only after this share of the limit.
_UNTIMED_SHARE = 0.1
_CHECKPOINT_EVERY_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """How to train: steps of `batch` sequences, until `steps`, `limit_s` seconds or `flops` FLOPs are spent.

    The learning rate rises over the first `warmup` of the run and falls along a cosine to `final_rate` of its
    peak. How far the run is, is the largest of the shares of the limits that are given, so a slow machine ends properly
    too, after fewer steps. FLOPs count the products of the rules (`training_flops_per_token`): equal budgets of them
    are the same on every machine. A thread each computes the gradients of `shards` parts of a batch. The other fields
    are AdamW's, the clipped gradient norm, and `TrainingRule`'s.
    """

    steps: int | None = 800
    limit_s: float | None = 72.0
    flops: float | None = None
    batch: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.03
    final_rate: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    capacity_factor: float = 1.5
    balance: float = 0.01
    shards: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"steps": self.steps, "limit_s": self.limit_s, "flops": self.flops}
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                raise InputError(f"training: {name} is {limit}; use more than 0")
        if all(limit is None for limit in limits.values()):
            raise InputError("training has no end; give it steps, limit_s or flops")

    def time_share(self, elapsed_s: float) -> float:
        """How far the run is by the clock: 0 until a tenth of `limit_s` has gone, 1 at the limit.

        >>> [round(Hyperparameters(limit_s=100.0).time_share(elapsed_s), 6) for elapsed_s in (5.0, 55.0, 100.0)]
        [0.0, 0.5, 1.0]
        """
        if self.limit_s is None:
            return 0.0
        return max(0.0, (elapsed_s / self.limit_s - _UNTIMED_SHARE) / (1 - _UNTIMED_SHARE))

    def done(self, spent: "Spent") -> float:
        """How far the run is, 1 at its end or beyond."""
        steps = 0.0 if self.steps is None else spent.steps / self.steps
        flops = 0.0 if self.flops is None else spent.flops / self.flops
        return max(steps, flops, self.time_share(spent.seconds))

    def rate(self, done: float) -> float:
        """The learning rate when the run is at `done`, 0 to 1.

        >>> hyper = Hyperparameters(learning_rate=1.0, warmup=0.1, final_rate=0.0)
        >>> [round(hyper.rate(done), 3) for done in (0.05, 0.1, 0.55, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
        """
        if done < self.warmup:
            return self.learning_rate * done / self.warmup
        cosine = 0.5 + 0.5 * math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a run has spent: steps, wall seconds, FLOPs; and its loss of late, in nats a byte."""

    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    loss: float = math.nan


def train(
    config: LanguageModelConfig,
    corpus: Corpus,
    hyper: Hyperparameters,
    progress: Progress,
    *,
    recipe: Recipe | None = None,
    checkpoint: Path | None = None,
    name: str = "the reference model",
) -> tuple[LanguageModel, Spent]:
    """Make a model and train it by `recipe` (None: `Plain`) on the training part of `corpus`, each domain alike.

    Matrices multiply in bfloat16 where this processor is faster at it; weights stay float32. Two runs that no clock
    ends give the same weights, and so does one that was stopped and goes on from its `checkpoint`, which is written
    every few seconds; who keeps the model may remove it.
    Errors: `MoerouteError` if the loss is no longer a number.
    """
    with one_thread():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hyper.seed)
            model = LanguageModel(config)
        training = _Training(model, corpus, hyper, recipe or Plain(), checkpoint, name)
        return model, training.run(progress)


class _Training:
    """A run on its way. What it draws in a step hangs on the seed and the number of the step alone."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        hyper: Hyperparameters,
        recipe: Recipe,
        checkpoint: Path | None,
        name: str,
    ) -> None:
        self._model, self._corpus, self._hyper, self._recipe, self._name = model, corpus, hyper, recipe, name
        self._checkpoint = checkpoint
        self._rule = TrainingRule(
            top_k=model.config.top_k, capacity_factor=hyper.capacity_factor, balance=hyper.balance
        )
        self._weights = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            [weight for weight in self._weights if weight.ndim > 1],
            lr=hyper.learning_rate,
            betas=hyper.betas,
            weight_decay=hyper.weight_decay,
            fused=True,
        )
        norms = [weight for weight in self._weights if weight.ndim == 1]
        self._optimizer.add_param_group({"params": norms, "weight_decay": 0.0})
        self._use_bfloat16 = _bfloat16_is_faster()
        self._identity = repr((model.config, hyper, recipe, corpus.digest))

    def run(self, progress: Progress) -> Spent:
        hyper = self._hyper
        spent = self._restored(progress)
        before_s = spent.seconds
        start_s = saved_s = time.perf_counter()
        with ThreadPoolExecutor(hyper.shards) as workers:
            while (done := hyper.done(spent)) < 1:
                loss, flops = self._step(spent.steps, hyper.rate(done), workers)
                loss = loss if spent.steps == 0 else 0.95 * spent.loss + 0.05 * loss
                if not math.isfinite(loss):
                    raise MoerouteError(
                        f"training diverged at step {spent.steps}: the loss is {loss}; lower its learning rate"
                    )
                if spent.steps % _STEPS_BETWEEN_REPORTS == 0:
                    progress(done, f"training {self._name}: step {spent.steps}, loss {loss:.2f} nats/byte")
                now_s = time.perf_counter()
                spent = Spent(
                    steps=spent.steps + 1, seconds=before_s + now_s - start_s, flops=spent.flops + flops, loss=loss
                )
                if self._checkpoint is not None and now_s - saved_s > _CHECKPOINT_EVERY_S:
                    self._save(self._checkpoint, spent)
                    saved_s = now_s
        progress(1.0, f"trained {self._name}: {spent.steps} steps in {spent.seconds:.0f} s")
        return spent

    def _step(self, step: int, rate: float, workers: ThreadPoolExecutor) -> tuple[float, float]:
        """One update of the weights: its loss and FLOPs."""
        hyper, config = self._hyper, self._model.config
        random = np.random.default_rng((hyper.seed, step))
        text_BS = _batch(self._corpus, hyper.batch, config.context + 1, random)
        shards = text_BS.chunk(hyper.shards)
        rules = [self._recipe.draw(self._rule, config, random) for _ in shards]
        seeds = random.integers(2**62, size=len(shards)).tolist()
        losses, gradients_by_shard = zip(*workers.map(self._gradients, shards, rules, seeds), strict=True)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        for weight, *parts in zip(self._weights, *gradients_by_shard, strict=True):
            # Stacked, since the fused AdamW misreads a gradient that is laid out otherwise than its weight.
            weight.grad = torch.stack(parts).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(self._weights, hyper.clip_norm)
        self._optimizer.step()
        flops = sum(
            training_flops_per_token(config, of_shard) * shard.shape[0] * config.context
            for of_shard, shard in zip(rules, shards, strict=True)
        )
        return sum(losses) / len(shards), flops

    def _gradients(self, text_BS: Tensor, rules: Rules, seed: int) -> tuple[float, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._use_bfloat16, cache_enabled=False):
            logits_BSV, router_loss = self._model(text_BS[:, :-1], rules, generator)
        loss = F.cross_entropy(logits_BSV.float().flatten(0, 1), text_BS[:, 1:].flatten())
        # Weights of layers and experts that are left out have no part in the loss.
        return loss.item(), torch.autograd.grad(loss + router_loss, self._weights, materialize_grads=True)

    def _save(self, checkpoint: Path, spent: Spent) -> None:
        content = {
            "identity": self._identity,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "spent": asdict(spent),
        }
        with replacing(checkpoint) as temporary:
            torch.save(content, temporary)

    def _restored(self, progress: Progress) -> Spent:
        """What a checkpoint of this very run says, with weights and optimizer as they were; else the beginning."""
        if self._checkpoint is None or not self._checkpoint.exists():
            return Spent()
        try:
            content: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
            if content["identity"] != self._identity:
                raise ValueError("it is of another run")
            self._model.load_state_dict(content["model"])
            self._optimizer.load_state_dict(content["optimizer"])
            spent = Spent(**content["spent"])
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            progress(0.0, f"{self._checkpoint}: no checkpoint to go on from ({reason}); training from the beginning")
            return Spent()
        progress(self._hyper.done(spent), f"going on with {self._name} at step {spent.steps}")
        return spent


def _batch(corpus: Corpus, batch: int, length: int, random: np.random.Generator) -> Tensor:
    """Training text [batch, length] as int64, domains in turn."""
    rows = []
    for row in range(batch):
        text = corpus.train[row % len(corpus.domains)]
        first = int(random.integers(text.size - length + 1))
        rows.append(text[first : first + length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _bfloat16_is_faster() -> bool:
    """Whether a matrix product takes less time in bfloat16 than in float32 here."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(512, 512, dtype=dtype)
        trials_s = []
        for _ in range(5):
            start_s = time.perf_counter()
            square @ square
            trials_s.append(time.perf_counter() - start_s)
        seconds[dtype] = min(trials_s)
    return seconds[torch.bfloat16] < seconds[torch.float32]
