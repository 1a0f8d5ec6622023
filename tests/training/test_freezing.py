"""What no loss trains is frozen, but for the parts that a further objective trains."""

from collections.abc import Callable

from coca_lit.models import CoCa
from coca_lit.training.optim import freeze


def test_a_part_of_a_part_that_an_objective_trains_stays(tiny_model: Callable[..., CoCa]) -> None:
    net = tiny_model()
    first, *others = dict.fromkeys(name.partition(".")[0] for name, _ in net.decoder.named_parameters())
    assert others
    freeze(net, [], {"contrastive": 1.0, "caption": 0.0}, trained=[f"decoder.{first}"])
    for name, parameter in net.decoder.named_parameters():
        assert parameter.requires_grad == name.startswith(f"{first}."), name
