"""Prints a config whose vocabulary is the words of Flickr8k's training captions, which shards do not list.

python experiments/distillation/words.py FLICKR8K_FOLDER
"""

import json
import sys

from coca_lit.data.datasets.captions import flickr_training_captions
from coca_lit.tokenizer import frequent_words

if __name__ == "__main__":
    words = frequent_words(flickr_training_captions(sys.argv[1]), 4)
    print(f"model: {{net: {{tokenizer: {json.dumps(words)}}}}}")
