"""Images of any shape: timm's NaFlexVit, batches that a budget of patches fills, and OpenCLIP 4's CoCa2 with both."""
