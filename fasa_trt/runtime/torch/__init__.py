"""FASA in a transformers model: for evaluation, and for GPUs where no TensorRT is installed.

from fasa_trt.runtime.torch import load_fasa

model = load_fasa("checkpoint", "profile.safetensors", budget=256)
model.generate(**tokenizer(prompts, return_tensors="pt", padding=True))
"""

from fasa_trt.runtime.torch.load import load_fasa, unload_fasa

__all__ = ["load_fasa", "unload_fasa"]
