"""What a training run does: its steps, learning rates with units, and their schedule.

AdamW moves every number by about its learning rate at each step, whatever its gradient is. So rates are given in units:

    group        unit of the rate                              set by
    latents      the width of a rounding bin                   lr_latents    0.001 crosses half a bin in 500 steps
    scales       the tensor's root mean square                 lr_scales
    codebooks    the same                                      lr_codebooks
    rest         none: embeddings, norms, biases               lr_rest

One number then means the same for a grid, for bit-planes and for weights with a learned step, and methods can be
compared. Each layer says which group its parameters belong to and how large a unit is (`units` in layer/linear.py).

Schedule: linear warm-up, constant, linear decay towards zero; the three phases sum to the number of steps.

Limits: one schedule for all groups, and no weight decay: on a latent it pulls towards a rounding boundary.
"""

from dataclasses import dataclass

from ..errors import UsageError

GROUPS = ("latents", "scales", "codebooks", "rest")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. ValueError for values out of range.

    steps                          optimizer steps
    lr_*                           learning rates in the units above; 0 freezes a group
    warmup, decay                  shares of the steps
    clip                           maximum norm of all gradients together
    log_every, checkpoint_every    steps between two rows of the history, and between two checkpoints
    log_movement                   the history also says how far each group has moved; keeps a copy of all that trains
    """

    steps: int
    lr_latents: float = 1e-3
    lr_scales: float = 3e-3
    lr_codebooks: float = 3e-3
    lr_rest: float = 5e-4
    warmup: float = 0.05
    decay: float = 0.5
    clip: float = 1.0
    log_every: int = 16
    checkpoint_every: int = 50
    log_movement: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"TrainConfig.{name} is {value}; it must be at least 1")
        if not 0 <= min(self.warmup, self.decay) <= self.warmup + self.decay <= 1:
            shares = f"TrainConfig.warmup is {self.warmup} and decay {self.decay}"
            raise UsageError(f"{shares}; they are shares of the steps: each at least 0, together at most 1")
        rates = {group: getattr(self, f"lr_{group}") for group in GROUPS}
        if not all(rate >= 0 for rate in rates.values()):
            raise UsageError(f"TrainConfig has learning rates {rates}; each must be at least 0 (frozen)")
        if not self.clip > 0:
            raise UsageError(f"TrainConfig.clip is {self.clip}; it must be above 0 (float('inf') does not clip)")

    def phases(self) -> tuple[int, int, int]:
        """Steps of warm-up, constant rate and decay; they sum to `steps`."""
        warmup = round(self.warmup * self.steps)
        decay = min(round(self.decay * self.steps), self.steps - warmup)  # both may have been rounded up
        return warmup, self.steps - warmup - decay, decay

    def rate(self, step: int) -> float:
        """The share of the full rates at `step`, counted from 0."""
        warmup, _, decay = self.phases()
        return min(1.0, (step + 1) / (warmup + 1), (self.steps - step) / (decay + 1))
