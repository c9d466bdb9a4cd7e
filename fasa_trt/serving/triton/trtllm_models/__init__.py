"""Python models of TensorRT-LLM's repository. Each file is copied into it as `1/model.py` and stands alone: it needs
numpy, transformers and Triton, as NVIDIA's containers have them, and nothing of fasa-trt.
"""
