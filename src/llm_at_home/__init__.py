"""llm-at-home: which quantization, adapter and GPU for a private LLM, and what each costs and is worth."""

__version__ = "0.1.0"
