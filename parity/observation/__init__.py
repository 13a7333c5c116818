"""What models are made to say, in ranks and in transformers."""
