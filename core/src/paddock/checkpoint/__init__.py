"""From bytes on disk to parameters: sources, strict safetensors, loading."""
