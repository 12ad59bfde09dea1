"""A plain PyTorch client loop: for each client load the weights, train, add up its update."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from jfed.benchmark import torch_networks
from jfed.benchmark.tasks import Task, flat
from jfed.engine.packing import Work


class TorchRunner:
    """Federated averaging in PyTorch, on the GPU if `device` is "cuda"."""

    def __init__(self, task: Task, *, channels_last: bool, device: str = "cpu") -> None:
        self.task, self.device = task, device
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        images = torch.from_numpy(task.data.train.images).permute(0, 3, 1, 2)
        self._images = images.contiguous(memory_format=self._layout).to(device)
        self._labels = torch.from_numpy(task.data.train.labels).long().to(device)
        mean, std = (torch.tensor(moment, dtype=torch.float32) for moment in task.moments())
        self._mean, self._std = mean.view(3, 1, 1).to(device), std.view(3, 1, 1).to(device)
        module: Any = torch_networks.build(task)
        weights = flat(task.start())
        torch_networks.load(module, weights)
        self.module = module.to(memory_format=self._layout).to(device)
        self._names = list(weights)
        self._server = {n: t.detach().clone() for n, t in self.module.state_dict().items()}

    def round(self, number: int) -> float:
        """Does a round and waits for it; returns its mean training loss."""
        total = {name: torch.zeros_like(tensor) for name, tensor in self._server.items()}
        losses, weight = [], 0.0
        for tier, items in enumerate(self.task.plan(number)):
            for item in items:
                losses += self._train(item, tier)
                weight += item.weight
                with torch.no_grad():
                    for name, tensor in self.module.state_dict().items():
                        total[name].add_(tensor - self._server[name], alpha=item.weight)
        for name, tensor in self._server.items():
            tensor.add_(total[name], alpha=1 / weight)
        return float(torch.stack(losses).mean())  # which waits for a GPU

    def _train(self, item: Work, tier: int) -> list[Tensor]:
        self.module.load_state_dict(self._server)
        optimizer = torch.optim.SGD(self.module.parameters(), lr=self.task.learning_rate)
        losses = []
        for batch in item.batches:
            loss = self.loss(batch, tier)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    def loss(self, examples: np.ndarray, tier: int) -> Tensor:
        """Mean cross-entropy of a batch of examples under the module's weights."""
        at = torch.from_numpy(examples).long().to(self.device)
        x = (self._images[at].float() - self._mean) / self._std
        x = x.contiguous(memory_format=self._layout)
        more = (self.task.iterations[tier],) if self.task.iterations else ()
        return functional.cross_entropy(self.module(x, *more), self._labels[at])

    def gradient(self) -> dict[str, np.ndarray]:
        """The module's gradients, by jfed's names and in its layouts."""
        gradients = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        return torch_networks.unload(gradients, self._names)

    def variables(self) -> dict[str, np.ndarray]:
        """The global weights by jfed's names, in its layouts."""
        return torch_networks.unload(self._server, self._names)
