"""The kernels as PyTorch operators, `torch.ops.fasa.*`; importing `fasa_trt.plugins.torch.ops` registers them."""
