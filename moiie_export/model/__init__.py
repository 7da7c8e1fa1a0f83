"""The readable PyTorch reference: what the exported graphs are traced from and judged against."""
