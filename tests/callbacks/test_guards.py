"""Steps that are not finite."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from coca_lit.callbacks.guards import NonFiniteGuard
from coca_lit.data.batch import Batch


def test_a_negative_spike_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^spike must be a number of at least 0, got -1$"):
        NonFiniteGuard(tmp_path, spike=-1)


def test_batch_norms_forget_a_batch_whose_step_the_loss_scaler_skips(tmp_path: Path) -> None:
    scaler: Any = SimpleNamespace(scale=lambda ones: 1024 * ones)
    plugin = SimpleNamespace(scaler=scaler)
    trainer: Any = SimpleNamespace(
        precision="16-mixed", precision_plugin=plugin, accumulate_grad_batches=1, global_step=0
    )
    guard, net, module = NonFiniteGuard(tmp_path), torch.nn.BatchNorm1d(2), L.LightningModule()
    module.net = net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for number in (1.0, float("inf")):
        batch = Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2), torch.ones(1), ["sample"])
        guard.on_train_batch_start(trainer, module, batch, 0)
        before = net.running_mean.clone()
        loss = 1024 * net(torch.tensor([[number, 1.0], [2.0, 3.0]])).square().mean()
        guard.on_before_backward(trainer, module, loss)
        guard.on_before_optimizer_step(trainer, module, optimizer)
    assert torch.equal(net.running_mean, before)
    assert before.abs().sum() > 0
