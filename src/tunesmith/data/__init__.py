"""Records to examples to tokens to batches: sources → formats → template → samples → pack."""
