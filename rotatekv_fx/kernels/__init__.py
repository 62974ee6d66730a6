"""What the ops compute: one folder an area, each with a plain torch reference beside its Triton kernels."""
