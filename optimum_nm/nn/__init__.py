"""Packed layers in torch, and how transformers loads them."""

# Importing transformers' models registers the quantizer, which is made of this folder's modules: before any is begun.
import transformers.modeling_utils  # noqa: F401
