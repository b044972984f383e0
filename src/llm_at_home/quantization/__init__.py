"""How a base model is loaded, one file a method family, and which kernel its linear layers run."""
