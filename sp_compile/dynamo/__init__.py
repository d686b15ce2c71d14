"""What is taken out of Dynamo's graph before it is traced again: FlexAttention and ``torch.vmap``."""
