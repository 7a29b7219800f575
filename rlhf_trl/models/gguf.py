"""
A folder that `model.path` takes, from a folder that holds a GGUF file of SmolLM2:

    python -m rlhf_trl.models.gguf FOLDER_WITH_GGUF OUTPUT_FOLDER [--dtype bfloat16]

Needs the `gguf` package. A GGUF names its architecture and its tokenizer's merges, but not everything that a training
needs, hence the two repairs below.
"""

import argparse
from pathlib import Path
from typing import Any

from rlhf_trl.errors import ConfigError


def export(source: str | Path, output_dir: str | Path, dtype: str = "bfloat16", max_length: int = 8192) -> Path:
    """
    Loads the one GGUF file in `source`, dequantizes and repairs it, and saves model and tokenizer to `output_dir`.

    Raises:
        `ConfigError`: no GGUF file or more than one in `source`, or `output_dir` already holds files.
    """
    source, output_dir = Path(source), Path(output_dir)
    files = sorted(source.glob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"`{source}` holds {len(files)} GGUF files. Pass the folder of exactly one.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ConfigError(f"`{output_dir}` is not empty. Pass another output folder, or remove it.")

    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=files[0].name)
    # A GGUF keeps no pre-tokenizer: SmolLM2 was trained with every digit a token of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = max_length
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=files[0].name, dtype=torch.float32).to(
        getattr(torch, dtype)
    )
    # The weights are plain by now; left in, these make a reload look for a GGUF again.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir


def main(arguments: list[str] | None = None) -> None:
    """The command line of `export`."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_trl.models.gguf", description="GGUF of SmolLM2 -> transformers folder"
    )
    parser.add_argument("source", help="folder with one .gguf file")
    parser.add_argument("output_dir", help="folder to write, the later `model.path`")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args(arguments)
    try:
        print(export(options.source, options.output_dir, options.dtype))
    except ConfigError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
