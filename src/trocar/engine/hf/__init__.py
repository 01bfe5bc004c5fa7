"""The embedded engine: a Hugging Face transformers model, several requests in one forward pass."""
