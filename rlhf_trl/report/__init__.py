"""Pages of results: self-contained HTML, and the same as Markdown."""
