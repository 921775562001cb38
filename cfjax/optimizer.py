"""The optimizer: clipped AdamW with warm-up, as published."""

import dataclasses

import optax

from cfjax.errors import UserError, check_choice

LEARNING_RATE_SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer; `learning_rate_schedule` and `make_optimizer` read every field.

    Attributes:
      learning_rate: after warm-up.
      schedule: after warm-up, "constant" or "cosine" to 0 at `num_train_steps`.
      warmup_steps: train steps in which the learning rate rises linearly from 0.
      num_train_steps: the length of the run.
      b1, b2, eps, weight_decay: AdamW's; the decay applies to all parameters.
      max_grad_norm: gradients are scaled down to this global norm.
    """

    learning_rate: float = 8e-4
    schedule: str = "constant"
    warmup_steps: int = 25_000
    num_train_steps: int = 500_000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self):
        check_choice("learning rate schedule", self.schedule, LEARNING_RATE_SCHEDULES)
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps is {self.warmup_steps}, but must be at least 0.")
        if self.schedule == "cosine" and self.warmup_steps >= self.num_train_steps:
            raise UserError(
                f"warmup_steps is {self.warmup_steps}, but the cosine schedule needs fewer than the"
                f" {self.num_train_steps} train steps."
            )


def learning_rate_schedule(settings: OptimizerSettings) -> optax.Schedule:
    """Train steps taken before -> learning rate; the first update has 0 if there is a warm-up."""
    after = optax.constant_schedule(settings.learning_rate)
    if settings.schedule == "cosine":
        num_decay_steps = settings.num_train_steps - settings.warmup_steps
        after = optax.cosine_decay_schedule(settings.learning_rate, num_decay_steps)
    if settings.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(0.0, settings.learning_rate, settings.warmup_steps)
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Clip to the global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(settings),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
    )
