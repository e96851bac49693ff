"""The TFDS builder of scikit-learn's 8x8 digits."""
