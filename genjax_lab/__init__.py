"""Ten generative-modelling methods as small pure functions that compose."""

__version__ = "0.1.0"
