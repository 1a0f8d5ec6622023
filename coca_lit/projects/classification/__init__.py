"""What the image encoder knows about classes: probes of frozen features, classifiers, classes as texts."""
