"""Models, tokenizers and adapters: loaded, checked, merged."""
