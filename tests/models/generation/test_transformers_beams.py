"""`scoring="openclip"` against the beam search of Transformers, which OpenCLIP 4 calls, with the same model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from coca_lit.models import CoCa, create_model
from helpers.naive import image_tokens


class Uncached(PreTrainedModel, GenerationMixin):
    """A CoCa that reads the whole caption at every step, as OpenCLIP's wrapper does."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: CoCa, seen: Tensor) -> None:
        super().__init__(PretrainedConfig(vocab_size=model.tokenizer.vocab_size, is_encoder_decoder=False))
        self.coca = SimpleNamespace(model=model, seen=seen)  # not a module: nothing of it is saved or initialised
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        model, seen = self.coca.model, self.coca.seen.expand(len(input_ids), -1, -1)
        lengths = torch.full((len(input_ids),), input_ids.shape[1])
        states, _, _ = model.text(input_ids, lengths, contrastive=False, packed=False)
        hidden = model.decoder(states[:, : input_ids.shape[1]], seen)
        return CausalLMOutput(logits=model.decoder.vocabulary(hidden))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def random_model(seed: int, end: float) -> CoCa:
    torch.manual_seed(seed)
    model = create_model("coca_tiny").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.decoder.vocabulary.weight[model.tokenizer.eot_id] *= end
    return model


@pytest.mark.parametrize(
    ("seed", "end", "beams", "longest", "least", "penalty"),
    [(0, 0.5, 6, 12, 5, 1.0), (2, 2.0, 3, 16, 0, 1.0), (3, 2.0, 4, 8, 0, 0.5)],
)
@torch.no_grad()
def test_captions_and_scores_are_those_of_transformers(
    seed: int, end: float, beams: int, longest: int, least: int, penalty: float
) -> None:
    model = random_model(seed, end)
    tokenizer = model.tokenizer
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    options = {"max_length": longest, "min_length": least, "length_penalty": penalty}
    ours = model.generate(
        images, strategy="beam", scoring="openclip", num_beams=beams, num_captions=beams, return_scores=True, **options
    )
    config = GenerationConfig(
        **options,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        use_cache=False,
        early_stopping=False,
        eos_token_id=tokenizer.eot_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.sot_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for i, image in enumerate(images):
        wrapper = Uncached(model, image_tokens(model, image))
        theirs = wrapper.generate(torch.tensor([[tokenizer.sot_id]]), generation_config=config)
        width = theirs.sequences.shape[1]
        assert torch.equal(ours.ids[i, :, :width], theirs.sequences)
        assert (ours.ids[i, :, width:] == tokenizer.pad_id).all()
        torch.testing.assert_close(ours.scores[i], theirs.sequences_scores, atol=1e-4, rtol=1e-4)
