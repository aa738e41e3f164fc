"""tunesmith: fine-tune open-weight language models. Importing it loads no torch."""

__version__ = "0.1.0"
