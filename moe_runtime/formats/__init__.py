"""Number formats: one module an encoding, and the registry that pairs them."""

from .registry import ACTIVATIONS, FORMATS, Extra, Format, Tokens, WeightLayout, Weights, find_format

__all__ = ["ACTIVATIONS", "FORMATS", "Extra", "Format", "Tokens", "WeightLayout", "Weights", "find_format"]
