"""Train a contrastive captioner: `python train.py --help`."""

from coca_lit.cli.train import train

if __name__ == "__main__":
    train()
