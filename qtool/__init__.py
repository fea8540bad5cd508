"""qtool: take a language model from the Hub to production."""

__version__ = "0.1.0"
