"""Where weights, tokenizers and chat templates come from."""
