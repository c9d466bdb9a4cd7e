"""Stage 2: a Hugging Face checkpoint and a profile become an ONNX decoder graph, and that becomes an engine."""
