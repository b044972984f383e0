"""What a run is worth: judges, text metrics and perplexity."""
