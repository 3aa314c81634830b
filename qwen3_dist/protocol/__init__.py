"""What the engine and its ranks say to each other: plans, outputs, messages and the channel they travel through.

Both sides import these values; nothing here imports torch.
"""
