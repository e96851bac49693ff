"""The TFDS builder of the King James Bible."""
