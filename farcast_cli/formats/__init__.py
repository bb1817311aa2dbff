"""Containers of tensors: what the bytes of one file mean. One module per file format, none of which needs torch."""
