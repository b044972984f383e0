"""Fine-tuning: the Lightning module, the data module and the callbacks."""
