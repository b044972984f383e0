"""The run record: its schema, its hash, where it is kept, its provenance and its copy in MLflow."""
