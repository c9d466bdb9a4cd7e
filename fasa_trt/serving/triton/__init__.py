"""Triton Inference Server: model repositories of engines, and the model that serves one on Triton's python backend."""
