"""The TFDS builder of Python's own language reference."""
