"""Where a model's files come from: a folder, a GGUF file, the Hugging Face Hub, the package index."""
