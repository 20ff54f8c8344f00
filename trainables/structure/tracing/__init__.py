"""How the graph of a network is found: by torch.fx, which runs its code with no numbers, or by
torch.export where torch.fx cannot."""
