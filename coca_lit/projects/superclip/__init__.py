"""The image vector also predicts which tokens its caption has (SuperCLIP)."""
