"""Public weights as variables of our networks: one module for each published format.

Files are .npz or .safetensors, which hold arrays only; a pickle is read by `load_arrays` alone,
which admits arrays and nothing else.
"""

from genjax_lab.pretrained import edm, llada, mdlm, natten, qwen2, var
from genjax_lab.pretrained.unpickle import load_arrays

__all__ = ["edm", "llada", "load_arrays", "mdlm", "natten", "qwen2", "var"]
