"""The Llama model on Transformer Engine layers."""
