"""transformers' models as they are: loading, the probes that find out how to run them, and scoring."""
