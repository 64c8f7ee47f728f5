"""Pipeline room: what a rank does for one training step, with torch modules as stages.

In: the stages held here, this rank's chunks of inputs and labels. Out: gradients in the modules'
parameters, losses, outputs. The executor calls `run` and `begin`; order is the schedule's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from whalefall.errors import ConfigError
from whalefall.pipeline.actions import Action, Schedule, Task
from whalefall.pipeline.torch.p2p import Link
from whalefall.pipeline.torch.store import WeightGradStore

__all__ = ["StepWorker"]

Tensors = list[Any]  # tensors, or None where a stage passes none


class StepWorker:
    """One rank's state during one step.

    Args:
        schedule: what is being run.
        stages: stage → module, those of this rank.
        link: to the other ranks.
        inputs, labels: chunk → tensors, for chunks that enter, or end, here.
        criterion: (*outputs, *labels) → a scalar; None in inference.
        keep_outputs: keep the last stage's outputs.
    """

    def __init__(
        self, schedule: Schedule, stages: Mapping[int, nn.Module], link: Link,
        inputs: Mapping[int, Sequence[Any]], labels: Mapping[int, Sequence[Any]],
        criterion: Callable[..., torch.Tensor] | None, keep_outputs: bool,
    ) -> None:  # fmt: skip
        self.schedule = schedule
        self.stages = stages
        self.link = link
        self.last = schedule.num_stages - 1
        self.criterion = criterion
        self.labels = labels
        self.keep_outputs = keep_outputs
        self.inputs: dict[Task, Tensors] = {Task(0, c): list(x) for c, x in inputs.items()}
        self.edges: dict[Task, list[GradientEdge | None]] = {}
        self.to_send: dict[Task, Tensors] = {}  # by the task that consumes them
        self.grads: dict[Task, Tensors] = {}  # of a task's outputs
        self.grads_to_send: dict[Task, Tensors] = {}
        self.live_loss: dict[int, torch.Tensor] = {}
        self.losses: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, Tensors] = {}
        self.whole: dict[Task, Tensors] = {}  # outputs with their graph, for the hook
        self.records_parts = all(getattr(m, "records_parts", False) for m in stages.values())
        types = {type(module) for module in stages.values()}
        hook = getattr(next(iter(types)), "overlapped_forward_backward", None)
        self.hook = hook if len(types) == 1 and torch.is_grad_enabled() else None

    def run(self, action: Action) -> None:
        """Compute one action."""
        if action.kind == "F":
            self._forward(action.task)
        elif action.kind == "W":
            WeightGradStore.pop()
        elif action.kind == "FB" and action.second is not None:
            if self.hook is not None:
                self._overlapped(action.task, action.second)
            else:
                self._forward(action.task)
                self._backward(action.second)
        elif action.kind == "B":
            self._backward(action.task)
        elif action.kind == "I":
            self._split_backward(action.task)
        else:
            raise ConfigError(f"pipeline: a training step cannot run {action}")

    def begin(self, action: Action) -> Callable[[], Any]:
        """Begin one message."""
        if action.kind == "SEND_F":
            return self.link.send(action, self.to_send.pop(action.task))
        if action.kind == "SEND_B":
            return self.link.send(action, self.grads_to_send.pop(action.task))
        forward = action.kind == "RECV_F"
        tensors, wait = self.link.receive(action, grad=forward and torch.is_grad_enabled())
        (self.inputs if forward else self.grads)[action.task] = tensors
        return wait

    def _take_inputs(self, task: Task) -> Tensors:
        """A task's inputs; from this rank's stage before, cut off from its graph."""
        if task in self.inputs:
            return self.inputs[task]
        grad = torch.is_grad_enabled()
        self.inputs[task] = [
            None if x is None else x.detach().requires_grad_(grad and x.is_floating_point())
            for x in self.to_send.pop(task)
        ]
        return self.inputs[task]

    def _forward(self, task: Task) -> None:
        outputs = _as_list(self.stages[task.stage](*self._take_inputs(task)))
        loss = None
        if task.stage == self.last and self.criterion is not None:
            loss = self.criterion(*outputs, *self.labels.get(task.chunk, ()))
        self._keep(task, outputs, loss)

    def _keep(self, task: Task, outputs: Tensors, loss: torch.Tensor | None) -> None:
        """Put a forward's results where backward, messages and the caller find them."""
        if task.stage < self.last:
            self.to_send[Task(task.stage + 1, task.chunk)] = outputs
        elif self.keep_outputs:
            self.outputs[task.chunk] = [_detached(x) for x in outputs]
        if loss is not None:
            self.losses[task.chunk] = loss.detach()
        if not torch.is_grad_enabled():
            del self.inputs[task]
        elif loss is not None:
            self.live_loss[task.chunk] = loss
        else:
            # the graph's ends alone: an output's memory is free once it is sent
            self.edges[task] = [_edge(x) for x in outputs]
        if self.hook is not None:
            self.whole[task] = outputs

    def _output_grads(self, task: Task) -> Tensors:
        """The gradients of a task's outputs, received or left by this rank's stage after it."""
        if task in self.grads:
            return self.grads.pop(task)
        return self.grads_to_send.pop(task)

    def _backward(self, task: Task) -> None:
        if task.stage == self.last:
            self.live_loss.pop(task.chunk).backward()
        else:
            pairs = [
                (edge, grad)
                for edge, grad in zip(self.edges.pop(task), self._output_grads(task), strict=True)
                if edge is not None and grad is not None
            ]
            torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs])
        self._leave_input_grads(task)

    def _leave_input_grads(self, task: Task) -> None:
        inputs = self.inputs.pop(task)
        self.whole.pop(task, None)
        if task.stage > 0:
            # a gradient that is none is zero: its message is expected all the same
            self.grads_to_send[Task(task.stage - 1, task.chunk)] = [
                torch.zeros_like(x) if x.grad is None else x.grad for x in inputs
            ]

    def _split_backward(self, task: Task) -> None:
        WeightGradStore.enabled = True
        try:
            self._backward(task)
        finally:
            WeightGradStore.enabled = False
        WeightGradStore.flush()

    def _overlapped(self, front: Task, back: Task) -> None:
        """One chunk's forward and another's backward in the modules' own hook."""
        ends_here = front.stage == self.last
        starts_here = back.stage == self.last
        outputs, loss = self.hook(  # type: ignore[misc]
            self.stages[front.stage],
            self._take_inputs(front),
            self.criterion if ends_here else None,
            list(self.labels.get(front.chunk, ())) if ends_here else [],
            self.stages[back.stage],
            self.live_loss.pop(back.chunk) if starts_here else None,
            self.whole.pop(back),
            [] if starts_here else self._hook_grads(back),
        )
        self._keep(front, _as_list(outputs), loss)
        self.edges.pop(back, None)
        self._leave_input_grads(back)

    def _hook_grads(self, task: Task) -> Tensors:
        return list(self._output_grads(task))


def _as_list(outputs: Any) -> Tensors:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _detached(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def _edge(x: torch.Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(x) if x is not None and x.requires_grad else None
