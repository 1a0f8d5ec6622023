"""Train a contrastive captioner: `python train.py --help`."""

from coca_lit.cli import train_command

if __name__ == "__main__":
    train_command()
