"""What a config leaves open, filled in from the data, the weights and the machine before a run is built."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from coca_lit.cli.assembly import build, data_place
from coca_lit.cli.schema import AUTO, unresolved, written
from coca_lit.errors import ConfigError, error_context

if TYPE_CHECKING:
    from coca_lit.models import DualEncoder

REQUIRED = "required"  # `init_from` of an experiment that trains a model further
SMOKE_STEPS = 2  # of trainer=smoke


def with_vocabulary(cfg: DictConfig) -> DictConfig:
    """The config with the words of the training captions as the network's tokenizer, if `vocabulary` is set.
    Checkpoints hold the list.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.tokenizer import frequent_words

    if cfg.vocabulary is None:
        return cfg
    with data_place(cfg):
        groups = build(cfg.data, "data", offered={"tokenizer": None}).training_captions().values()
    with error_context("vocabulary"):
        words = frequent_words((caption for captions in groups for caption in captions), cfg.vocabulary)
    print_rank_zero(
        f"vocabulary: {len(words)} words that occur at least {cfg.vocabulary} times in the training captions"
    )
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model.net.tokenizer = words
    return cfg


def with_start(cfg: DictConfig) -> DictConfig:
    """The config of an experiment that trains a model further (`init_from: required`): from random weights if it is but
    a step or two, to check a set-up.

    Raises:
        ConfigError: nobody said which model.
    """
    if cfg.init_from != REQUIRED:
        return cfg
    if not 0 < cfg.trainer.max_steps <= SMOKE_STEPS:
        raise ConfigError(
            "this experiment trains a model further: name it, such as init_from=outputs/my_run, or say init_from=null "
            "to start from random weights"
        )
    cfg = cfg.copy()
    cfg.init_from = None
    return cfg


def with_recipe(cfg: DictConfig, source: "DualEncoder | None" = None, resumed: bool = False) -> DictConfig:
    """The config with plain values for the keys that are "auto", if it names a recipe; prints them and why.

    Args:
        source: the model in `init_from`, if any.
        resumed: take the values that the run folder records.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.models import CoCa
    from coca_lit.reading import read_run_yaml
    from coca_lit.runs.run_folder import CONFIG

    if cfg.recipe is None:
        return cfg
    cfg = cfg.copy()
    if resumed:
        for key, value in leaves(read_run_yaml(Path(cfg.output_dir), CONFIG)):
            _fill(cfg, key, value)
        return cfg
    arguments = None
    if source is not None:
        if not isinstance(source, CoCa):
            raise ConfigError(f"init_from: this recipe takes a CoCa, and {cfg.init_from} is a CLIP")
        arguments = source.config
    node = cast(dict[str, Any], OmegaConf.to_container(cfg.data, resolve=True))
    known = {key: value for key, value in node.items() if value != AUTO}
    with data_place(cfg):
        # Of which only the texts are read: batch and size do not matter.
        data = build(OmegaConf.create({"batch_size": 1, **known}), "data", offered={"tokenizer": None})
        given = {key: value for key, value in leaves(unresolved(cfg)) if value != AUTO and "${" not in str(value)}
        what, choices = build(cfg.recipe, "recipe")(data, given, arguments)
    print_rank_zero(f"chosen for {what}; every line is a key:")
    for key, value, why in choices:
        if any([_fill(cfg, *leaf) for leaf in leaves(value, key)]):
            shown = "…" if isinstance(value, dict) else written(value)
            print_rank_zero(f"  {key}={shown}  # {why}")
    return cfg


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all values in nested dictionaries."""
    if not isinstance(node, dict) or not node:
        yield path, node
        return
    for key, value in node.items():
        yield from leaves(value, f"{path}.{key}" if path else key)


def _fill(cfg: DictConfig, key: str, value: Any) -> bool:
    """Sets a key that is "auto", or an argument of the network that is not given; whether it did."""
    before = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    if value == AUTO or not (before == AUTO or (before is None and key.startswith("model.net."))):
        return False
    with open_dict(cfg):
        OmegaConf.update(cfg, key, value, force_add=True)
    return True
