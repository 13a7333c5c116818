"""The layers of Transformer Engine that the model uses, in torch: same names, parameters and meaning."""
