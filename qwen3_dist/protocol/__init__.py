"""The values that the engine and its ranks exchange: plans, results and messages, and the channel that carries them.

Both sides import this package. It imports no torch.
"""
