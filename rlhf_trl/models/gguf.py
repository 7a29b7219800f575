"""
Conversion of a GGUF file of SmolLM2 to a folder for `model.path`.

    python -m rlhf_trl.models.gguf FOLDER_WITH_GGUF OUTPUT_FOLDER [--dtype bfloat16]

Needs the `gguf` package. A GGUF holds the architecture and the merges of the tokenizer, but not everything that
training needs, hence the two repairs in [`export`].
"""

import argparse
from pathlib import Path
from typing import Any

from rlhf_trl.errors import ConfigError


def export(source: str | Path, output_dir: str | Path, dtype: str = "bfloat16", max_length: int = 8192) -> Path:
    """
    Dequantize and repair the GGUF file in `source`, and save model and tokenizer to `output_dir`.

    Args:
        source (`str` or `Path`): folder with one GGUF file.
        output_dir (`str` or `Path`): folder to write.
        dtype (`str`): type of the saved weights.
        max_length (`int`): `model_max_length` of the tokenizer, in tokens.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if `source` doesn't hold exactly one GGUF file, or `output_dir` holds files.
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
    # A GGUF has no pre-tokenizer, and SmolLM2 was trained with each digit as a token
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = max_length
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=files[0].name, dtype=torch.float32).to(
        getattr(torch, dtype)
    )
    # The weights are dequantized by now. With these attributes a reload would look for a GGUF again
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of [`export`]."""
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
