"""How a rewritten graph becomes machine code. The only package that imports tvm."""
