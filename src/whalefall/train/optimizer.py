"""Train room: AdamW over flat fp32 buffers, and what a step needs of all gradients together.

In: parameters whose gradients are views of flat buffers. Out: stepped master weights, moments that
a checkpoint can name. Source: DeepSeek-V3 report, 4.2 (AdamW, clipping, a rate that falls).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whalefall.train import recipe as settings

__all__ = ["Flat", "Optimizer", "learning_rate"]


def learning_rate(step: int, steps: int, setting: settings.Optimizer) -> float:
    """The rate of a step (from 0) of a run of `steps`."""
    warm = min(1.0, (step + 1) / max(1, setting.warmup))
    progress = step / steps
    fall = 1.0
    if progress > setting.hold:
        fall = 1 - (1 - setting.floor) * (progress - setting.hold) / (1 - setting.hold)
    return setting.rate * warm * fall


@dataclass
class Flat:
    """Parameters of one kind in one buffer, their gradients in another.

    Attributes:
        values: all parameters, fp32; its `.grad` has all gradients.
        parameters: views of it.
        copies: how many ranks hold the same values and count them in the gradients' norm.
    """

    values: nn.Parameter
    parameters: list[nn.Parameter]
    copies: int

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], copies: int) -> Flat:
        """Move parameters and gradients into one buffer each; they become views."""
        sizes = [p.numel() for p in parameters]
        joined = [p.detach().flatten() for p in parameters] or [torch.zeros(0)]
        values = nn.Parameter(torch.cat(joined))
        values.grad = torch.zeros_like(values)
        flat = cls(values, list(parameters), copies)
        for p, part in zip(parameters, values.data.split(sizes), strict=True):
            p.data = part.view(p.shape)
        flat.attach()
        return flat

    def views(self, buffer: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its part of a buffer laid out as `values`."""
        parts = buffer.split([p.numel() for p in self.parameters]) if self.parameters else ()
        for p, part in zip(self.parameters, parts, strict=True):
            yield p, part.view(p.shape)

    def attach(self) -> None:
        """Let gradients be views again, with the values that someone put in their place."""
        for p, view in self.views(self.gradients):
            if p.grad is None:
                p.grad = view
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)
                p.grad = view

    @property
    def gradients(self) -> Tensor:
        """All gradients."""
        grad: Tensor = self.values.grad
        return grad


class Optimizer:
    """AdamW, with an average of the weights where the recipe wants one.

    Args:
        decayed, plain: buffers with and without weight decay.
    Attributes:
        averages: for each buffer its running average; empty where none is kept.
    """

    def __init__(self, decayed: list[Flat], plain: list[Flat], setting: settings.Optimizer) -> None:
        self.setting = setting
        self.flats = [*decayed, *plain]
        groups = [
            {"params": [f.values for f in decayed], "weight_decay": setting.weight_decay},
            {"params": [f.values for f in plain], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=setting.rate, betas=setting.betas, fused=True)
        for flat in self.flats:  # there from the beginning, so that a checkpoint can be loaded
            self.adam.state[flat.values] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(flat.values),
                "exp_avg_sq": torch.zeros_like(flat.values),
            }
        self.averages = [f.values.detach().clone() for f in self.flats if setting.average]

    def square_sum(self) -> float:
        """This rank's share of the squared norm of all gradients; over all ranks it adds up."""
        return sum(float(torch.dot(f.gradients, f.gradients)) / f.copies for f in self.flats)

    def step(self, step: int, steps: int, norm: float) -> None:
        """Clip by the norm of all ranks' gradients, step, follow with the average, clear."""
        scale = min(1.0, self.setting.clip / (norm + 1e-6))
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(step, steps, self.setting)
        for flat in self.flats:
            flat.gradients.mul_(scale)
        self.adam.step()
        keep = min(self.setting.average, (1 + step) / (10 + step))
        for average, flat in zip(self.averages, self.flats, strict=False):
            average.lerp_(flat.values.detach(), 1 - keep)
        self.clear()

    def clear(self) -> None:
        """All gradients zero."""
        for flat in self.flats:
            flat.gradients.zero_()

    def state_of(self) -> dict[str, dict[nn.Parameter, Tensor]]:
        """Kind of state → parameter → its part, as views: "exp_avg", "exp_avg_sq", "average"."""
        kinds: dict[str, list[Tensor]] = {
            kind: [self.adam.state[f.values][kind] for f in self.flats]
            for kind in ("exp_avg", "exp_avg_sq")
        }
        if self.averages:
            kinds["average"] = self.averages
        return {
            kind: {p: v for flat, b in zip(self.flats, buffers, strict=True)
                   for p, v in flat.views(b)}
            for kind, buffers in kinds.items()
        }  # fmt: skip

    def set_steps(self, step: int) -> None:
        """Say how many steps have been done."""
        for flat in self.flats:
            self.adam.state[flat.values]["step"].fill_(float(step))
