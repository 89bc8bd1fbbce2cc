"""From PyTorch stages to a verified artifact."""
