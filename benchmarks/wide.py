"""A model of 8 billion parameters' shape and no weights, for machines that reach no model hub: `wide.py DIRECTORY`.

The embedded model's tokenizer, and blocks as wide and as many as those of a model in use. vLLM makes weights up with
`--load-format dummy`: what it says is noise, and how long it takes is not.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from servers import model_home

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


def make(into: Path) -> None:
    home = model_home()
    shutil.copytree(home, into, ignore=shutil.ignore_patterns("*.safetensors"))
    config = into / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SHAPE, indent=2))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
