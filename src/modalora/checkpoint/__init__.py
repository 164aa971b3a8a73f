"""safetensors and JSON on disk, with a manifest."""
