"""What a training run costs, and what the published V3 run implies about its hardware's use."""

from __future__ import annotations

from dataclasses import dataclass

from whalefall.arguments import finite
from whalefall.errors import ConfigError

__all__ = ["PRETRAINING", "TrainingRun"]


@dataclass(frozen=True)
class TrainingRun:
    """One run; the defaults are V3's (report, table 1: 2.664 M of 2.788 M H800 hours pre-train).

    Attributes:
        gpu_hours: of pre-training, which `tokens` belongs to.
        other_hours: context extension and post-training.
        gpu_hour: dollars a GPU-hour.
        tokens: tokens trained on.
        active_parameters: parameters that a token uses.
        peak_tflops: BF16 peak of a GPU, dense.
    """

    gpu_hours: float = 2.664e6
    other_hours: float = 0.124e6
    gpu_hour: float = 2.0
    tokens: float = 14.8e12
    active_parameters: float = 37e9
    peak_tflops: float = 989.0

    def __post_init__(self) -> None:
        for name in ("gpu_hours", "tokens", "active_parameters", "peak_tflops"):
            finite(f"plan train: {name}", getattr(self, name), 0, above=True)
        for name in ("other_hours", "gpu_hour"):
            finite(f"plan train: {name}", getattr(self, name), 0)

    @property
    def total_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.gpu_hours + self.other_hours

    @property
    def cost(self) -> float:
        """Dollars of the whole run."""
        return self.total_hours * self.gpu_hour

    @property
    def tflops_gpu(self) -> float:
        """Sustained model TFLOPS of a GPU: 6 operations a parameter and token."""
        return 6 * self.active_parameters * self.tokens / (self.gpu_hours * 3600) / 1e12

    @property
    def utilisation(self) -> float:
        """`tflops_gpu` as a share of the BF16 peak."""
        return self.tflops_gpu / self.peak_tflops

    def days(self, gpus: int) -> float:
        """Days that the run takes on so many GPUs."""
        if gpus < 1:
            raise ConfigError(f"plan train: {gpus} GPUs, wanted 1 or more")
        return self.total_hours / gpus / 24


PRETRAINING = TrainingRun()
