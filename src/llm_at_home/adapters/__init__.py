"""What ties a PEFT adapter to a base model."""
