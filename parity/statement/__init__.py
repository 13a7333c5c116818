"""What a Megatron model must hold, said a second time without the converter."""
